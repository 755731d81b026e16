"""How far the policy is from another one: estimators of the KL divergence, and what controls its weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from lightrft.errors import ConfigError
from lightrft.trainer.masking import inside

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "KL_ESTIMATORS",
    "AdaptiveKL",
    "FixedKL",
    "KLController",
    "kl_controller",
    "kl_estimate",
    "policy_drift",
]

_LARGEST = 20.0
"""Of the difference of two log-probs in an exponent, so that one token gives no infinity."""


def k1(log_ratio: Tensor) -> Tensor:
    """``log_ratio``: unbiased, of high variance, and negative for some tokens."""
    return log_ratio


def k2(log_ratio: Tensor) -> Tensor:
    """``log_ratio**2 / 2``: of low variance, biased, with the right gradient as a loss."""
    return 0.5 * log_ratio.square()


def k3(log_ratio: Tensor) -> Tensor:
    """``exp(-log_ratio) - 1 + log_ratio``: unbiased, of low variance, never negative.

    A ``log_ratio`` below -20 counts as -20, without gradient.
    """
    bounded = log_ratio.clamp(min=-_LARGEST)
    return (-bounded).exp() - 1 + bounded


KL_ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
"""Every estimator by the name of its flag: Schulman, *Approximating KL Divergence*, 2020."""


def kl_estimate(name: str, log_probs: Tensor, other_log_probs: Tensor, mask: Tensor) -> Tensor:
    """The divergence of the policy from another one at each token that the policy has drawn.

    Args:
        name: of ``KL_ESTIMATORS``.
        log_probs: of the policy, shape (batch, length).
        other_log_probs: of the other one, the initial model for example; shape (batch, length).
        mask: true at generated tokens, shape (batch, length).

    Returns:
        Shape (batch, length), 0 outside the mask; with gradient if ``log_probs`` has.

    Raises:
        ConfigError: there is no such estimator.
    """
    if name not in KL_ESTIMATORS:
        raise ConfigError(f"kl_estimator={name!r}: expected one of {', '.join(KL_ESTIMATORS)}")
    log_ratio = inside(log_probs, mask).float() - inside(other_log_probs, mask).float()
    return inside(KL_ESTIMATORS[name](log_ratio), mask)


def policy_drift(log_probs: Tensor, old_log_probs: Tensor, mask: Tensor) -> Tensor:
    """The divergence of the policy that has drawn the tokens from the one of now, at each token.

    The second term of CPGD (Liu et al., 2025), ``KL(old, now)``, by the unbiased estimator
    ``ratio - 1 - log(ratio)`` of tokens drawn from the old one.

    Args:
        log_probs: now, with gradient, shape (batch, length).
        old_log_probs: when the tokens were sampled, shape (batch, length).
        mask: true at generated tokens, shape (batch, length).
    """
    return kl_estimate("k3", old_log_probs, log_probs, mask)


class KLController(Protocol):
    """The weight of the divergence, and how it changes."""

    value: float

    def update(self, kl: float, samples: int) -> None:
        """After an iteration of ``samples`` sequences whose divergence was ``kl`` on average."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint held."""


class FixedKL:
    """A weight that stays.

    Args:
        value: the weight.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl: float, samples: int) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weight comes from the settings."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


class AdaptiveKL:
    """A weight that rises while the divergence is above its target, and falls while it is below.

    Ziegler et al., *Fine-Tuning Language Models from Human Preferences*, 2019, section 2.2: with
    ``e = clip((kl - target) / target, -0.2, 0.2)`` the weight is multiplied by ``1 + K * e``; here ``K`` is
    ``samples / horizon``, and at most 1, so that no large iteration makes the weight negative.

    Args:
        value: the first weight.
        target: of the divergence of a sequence, above 0.
        horizon: samples after which the weight may have changed by a fifth.
    """

    def __init__(self, value: float, target: float, horizon: int) -> None:
        self.value = value
        self._target = target
        self._horizon = horizon

    def update(self, kl: float, samples: int) -> None:
        """A divergence that is no finite number changes nothing."""
        if math.isfinite(kl):
            error = min(max(kl / self._target - 1, -0.2), 0.2)
            self.value *= 1 + error * min(samples / self._horizon, 1)

    def state_dict(self) -> dict[str, Any]:
        """The weight."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the weight; one of a fixed controller holds none, and the weight stays."""
        self.value = float(state.get("value", self.value))


def kl_controller(value: float, target: float, horizon: int) -> KLController:
    """An adaptive weight if there is a ``target`` above 0, else a fixed one."""
    return AdaptiveKL(value, target, horizon) if target > 0 else FixedKL(value)
