"""Losses of the policy, one number for each token; ``aggregation`` makes one number of them.

``POLICY_LOSSES`` has them by the name that ``--policy_loss`` takes. ``ratio`` is the probability of a token now over
that when it was sampled. Clip-higher is ``eps_clip_high`` above ``eps_clip_low``: Yu et al., *DAPO: An Open-Source LLM
Reinforcement Learning System at Scale*, 2025, equation 10.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightrft.errors import ConfigError
from lightrft.trainer.masking import inside, masked_mean

__all__ = ["POLICY_LOSSES", "PolicyInputs", "PolicyLoss", "policy_loss"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs:
    """What a policy loss is computed of.

    Attributes:
        log_probs: of the tokens now, with gradient, shape (batch, length).
        old_log_probs: when they were sampled, shape (batch, length).
        advantages: shape (batch, length).
        mask: true at generated tokens, shape (batch, length).
        eps_low: a ratio below ``1 - eps_low`` is clipped.
        eps_high: a ratio above ``1 + eps_high`` is clipped.
    """

    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    mask: Tensor
    eps_low: float = 0.2
    eps_high: float = 0.2

    @property
    def log_ratio(self) -> Tensor:
        """Shape (batch, length), 0 outside the mask."""
        return inside(self.log_probs, self.mask).float() - inside(self.old_log_probs, self.mask).float()

    @property
    def gains(self) -> Tensor:
        """The advantages, 0 outside the mask."""
        return inside(self.advantages, self.mask).float()

    @property
    def log_range(self) -> tuple[float, float]:
        """Between which logarithms of ratios nothing is clipped."""
        return (math.log1p(-self.eps_low) if self.eps_low < 1 else -math.inf), math.log1p(self.eps_high)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLoss:
    """What a policy loss gives.

    Attributes:
        per_token: the loss of each token, 0 outside the mask, shape (batch, length).
        clipped: which tokens clipping leaves without gradient, shape (batch, length).
    """

    per_token: Tensor
    clipped: Tensor


def ppo(inputs: PolicyInputs) -> PolicyLoss:
    """The clipped surrogate.

    Schulman et al., *Proximal Policy Optimization Algorithms*, 2017, equation 7:
    ``-min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A)``.
    """
    return _least(inputs, inputs.log_ratio.exp(), 1 - inputs.eps_low, 1 + inputs.eps_high)


def gspo(inputs: PolicyInputs) -> PolicyLoss:
    """The clipped surrogate of whole sequences.

    Zheng et al., *Group Sequence Policy Optimization*, 2025, equations 5 and 7: the ratio of a sequence is the
    geometric mean of those of its tokens, ``exp(sum of log ratio / length)``. Every token of a sequence has the loss of
    the sequence, so that the mean over each sequence, then over sequences, is the equation's.
    """
    mean = masked_mean(inputs.log_ratio, inputs.mask, 1).unsqueeze(1)
    return _least(inputs, mean.exp().expand_as(inputs.mask), 1 - inputs.eps_low, 1 + inputs.eps_high)


def gmpo(inputs: PolicyInputs) -> PolicyLoss:
    """The geometric mean of the clipped ratios of a sequence, times the advantage.

    Zhao et al., *Geometric-Mean Policy Optimization*, 2025, the token-level clipped objective:
    ``-sign(A) * (prod of abs(min(ratio * A, clip(ratio) * A)))**(1 / length)``, in which a ratio is bounded from above
    where the advantage is positive, and from below where it is negative. The paper's range from ``e**-0.4`` to
    ``e**0.4`` is ``eps_low=0.33, eps_high=0.49``. Every token of a sequence has the loss of the sequence, as in
    ``gspo``.
    """
    low, high = inputs.log_range
    ratio, gains = inputs.log_ratio, inputs.gains
    bounded = torch.where(gains > 0, ratio.clamp(max=high), ratio.clamp(min=low))
    mean = masked_mean(bounded, inputs.mask, 1).unsqueeze(1).exp()
    return PolicyLoss(per_token=-mean * gains, clipped=inputs.mask & (bounded != ratio))


def cispo(inputs: PolicyInputs) -> PolicyLoss:
    """REINFORCE with a clipped importance weight, which has no gradient: no token loses its own.

    Chen et al., *MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention*, 2025, objective CISPO:
    ``-stop_gradient(clip(ratio, 1 - eps_low, 1 + eps_high)) * A * log_prob``. The paper does not bound from below:
    ``eps_clip_low=1``.
    """
    ratio = inputs.log_ratio.detach().exp()
    weight = ratio.clamp(1 - inputs.eps_low, 1 + inputs.eps_high)
    loss = -weight * inputs.gains * inside(inputs.log_probs, inputs.mask).float()
    return PolicyLoss(per_token=loss, clipped=inputs.mask & (weight != ratio))


def cpgd(inputs: PolicyInputs) -> PolicyLoss:
    """The policy gradient, with the logarithm of the ratio clipped.

    Liu et al., *CPGD: Toward Stable Rule-based Reinforcement Learning for Language Models*, 2025, the objective's first
    term: ``min(log(ratio) * A, clip(log(ratio), log(1 - eps_low), log(1 + eps_high)) * A)``. Its second term, the
    policy drift, is ``kl.policy_drift``, switched on by ``policy_drift_coef``.
    """
    return _least(inputs, inputs.log_ratio, *inputs.log_range)


def _least(inputs: PolicyInputs, ratio: Tensor, low: float, high: float) -> PolicyLoss:
    gains = inputs.gains
    free, bounded = ratio * gains, ratio.clamp(low, high) * gains
    return PolicyLoss(per_token=-torch.minimum(free, bounded), clipped=inputs.mask & (bounded < free))


POLICY_LOSSES: dict[str, Callable[[PolicyInputs], PolicyLoss]] = {
    "ppo": ppo,
    "gspo": gspo,
    "gmpo": gmpo,
    "cispo": cispo,
    "cpgd": cpgd,
}
"""Every policy loss by the name of its flag."""


def policy_loss(name: str, inputs: PolicyInputs) -> PolicyLoss:
    """The loss ``name``.

    Raises:
        ConfigError: there is no such loss.
    """
    if name not in POLICY_LOSSES:
        raise ConfigError(f"policy_loss={name!r}: expected one of {', '.join(POLICY_LOSSES)}")
    return POLICY_LOSSES[name](inputs)
