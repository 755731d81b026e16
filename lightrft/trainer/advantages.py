"""Advantages: how much better each generated token did than expected.

Every estimator is a function of ``AdvantageInputs`` and gives ``Advantages``; ``ADVANTAGES`` has them by the name that
``--advantage_estimator`` takes. The reward of a sequence comes at its last token, and the penalty for leaving the
initial model (if it is part of the reward) at each token. Samples of one prompt are consecutive rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightrft.errors import ConfigError
from lightrft.trainer.masking import inside, last_of_each_row

__all__ = ["ADVANTAGES", "AdvantageInputs", "Advantages", "estimate", "token_rewards", "whiten"]

_SMALL = 1e-6


def _alone(sums: Tensor) -> Tensor:
    return sums


@dataclass(frozen=True, slots=True, kw_only=True)
class AdvantageInputs:
    """What advantages are computed of.

    Attributes:
        rewards: of each sequence, shape (batch,).
        mask: true at generated tokens, shape (batch, length). It may have holes, such as the answers of a tool.
        penalties: subtracted from the reward of each token, shape (batch, length), or ``None``.
        values: what the critic expected before each token, shape (batch, length), or ``None``.
        group_size: how many consecutive rows are samples of one prompt.
        gamma: discount of later rewards, by token.
        lambd: the lambda of generalised advantage estimation.
        whitened: whether ``gae`` gives advantages of mean 0 and variance 1 over all ranks.
        total: gives the sum of a small tensor over data-parallel ranks. *Collective*, if there are several.
    """

    rewards: Tensor
    mask: Tensor
    penalties: Tensor | None = None
    values: Tensor | None = None
    group_size: int = 1
    gamma: float = 1.0
    lambd: float = 1.0
    whitened: bool = False
    total: Callable[[Tensor], Tensor] = _alone

    def __post_init__(self) -> None:
        if self.mask.dim() != 2 or self.rewards.shape != self.mask.shape[:1]:
            raise ConfigError(
                f"rewards of shape {tuple(self.rewards.shape)} with a mask of shape {tuple(self.mask.shape)}: expected "
                "(batch,) and (batch, length)"
            )
        if self.group_size < 1 or len(self.rewards) % self.group_size:
            raise ConfigError(
                f"{len(self.rewards)} sequences in groups of {self.group_size}: expected all samples of each prompt, "
                "one after the other"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """What an estimator gives, 0 outside the mask.

    Attributes:
        advantages: shape (batch, length).
        returns: what the critic learns to predict, shape (batch, length).
    """

    advantages: Tensor
    returns: Tensor


def token_rewards(inputs: AdvantageInputs, rewards: Tensor) -> Tensor:
    """The reward of each token, shape (batch, length): ``rewards`` (batch,) at the last ones, less the penalties.

    Ouyang et al., *Training language models to follow instructions with human feedback*, 2022, put a penalty for each
    token into the reward.
    """
    given = last_of_each_row(inputs.mask) * rewards.float().unsqueeze(1)
    penalised = given if inputs.penalties is None else given - inputs.penalties
    return inside(penalised, inputs.mask)


def gae(inputs: AdvantageInputs) -> Advantages:
    """Generalised advantage estimation, of a critic.

    Schulman et al., *High-Dimensional Continuous Control Using Generalized Advantage Estimation*, 2016, equation 16:
    ``A_t = sum over l of (gamma * lambda)**l * delta_{t+l}`` with ``delta_t = r_t + gamma * V_{t+1} - V_t``, where
    ``V`` after the last token is 0. The returns are ``A_t + V_t``.

    Raises:
        ConfigError: there are no values.
    """
    if inputs.values is None:
        raise ConfigError("advantage_estimator='gae' needs the values of a critic: give a critic, or another estimator")
    values = inside(inputs.values.float(), inputs.mask)
    rewards = token_rewards(inputs, inputs.rewards)
    following = later = values.new_zeros(len(values))
    found = torch.zeros_like(values)
    for token in reversed(range(values.shape[1])):
        there = inputs.mask[:, token]
        delta = rewards[:, token] + inputs.gamma * following - values[:, token]
        later = torch.where(there, delta + inputs.gamma * inputs.lambd * later, later)
        following = torch.where(there, values[:, token], following)
        found[:, token] = later
    found = inside(found, inputs.mask)
    returns = inside(found + values, inputs.mask)
    return Advantages(
        advantages=whiten(found, inputs.mask, inputs.total) if inputs.whitened else found, returns=returns
    )


def returns_to_go(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """The sum of rewards (batch, length) from each token on, discounted by ``gamma`` for each token of ``mask``."""
    found = torch.zeros_like(rewards)
    later = rewards.new_zeros(len(rewards))
    for token in reversed(range(rewards.shape[1])):
        later = torch.where(mask[:, token], rewards[:, token] + gamma * later, later)
        found[:, token] = later
    return inside(found, mask)


def whiten(advantages: Tensor, mask: Tensor, total: Callable[[Tensor], Tensor] = _alone) -> Tensor:
    """``advantages`` with mean 0 and variance 1 over the tokens of ``mask`` on all ranks; 0 where all are alike.

    Args:
        advantages: shape (batch, length).
        mask: the same shape.
        total: as in ``AdvantageInputs``. *Collective*, called twice.
    """
    chosen = inside(advantages, mask).double()
    count, summed = total(torch.stack([mask.sum().double(), chosen.sum()])).unbind()
    centred = inside(chosen - summed / count.clamp(min=1), mask)
    (squares,) = total(centred.square().sum().unsqueeze(0)).unbind()
    spread = (squares / count.clamp(min=1)).sqrt()
    return (centred / (spread + _SMALL)).to(advantages.dtype)


def _to_go(inputs: AdvantageInputs, rewards: Tensor) -> Advantages:
    found = returns_to_go(token_rewards(inputs, rewards), inputs.mask, inputs.gamma)
    return Advantages(advantages=found, returns=found)


def _whitened(inputs: AdvantageInputs, found: Advantages) -> Advantages:
    return Advantages(advantages=whiten(found.advantages, inputs.mask, inputs.total), returns=found.returns)


def reinforce(inputs: AdvantageInputs) -> Advantages:
    """The return from each token on, without a baseline.

    Williams, *Simple statistical gradient-following algorithms for connectionist reinforcement learning*, 1992, with a
    baseline of 0, and of the rewards those that the token can have an influence on:
    ``A_t = sum over l of gamma**l * r_{t+l}``.
    """
    return _to_go(inputs, inputs.rewards)


def reinforce_plus_plus(inputs: AdvantageInputs) -> Advantages:
    """The return from each token on, with mean 0 and variance 1 over all tokens of all ranks.

    Hu et al., *REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models*, 2025:
    ``(A - mean(A)) / std(A)`` of the returns ``A``, over the batch.
    """
    return _whitened(inputs, _to_go(inputs, inputs.rewards))


def reinforce_baseline(inputs: AdvantageInputs) -> Advantages:
    """REINFORCE++ with the mean reward of the prompt as baseline, before the returns are whitened.

    Hu et al., *REINFORCE++*, 2025, the variant with baseline: ``R_i - mean of R over the group``, then
    ``(A - mean(A)) / std(A)`` over the batch.
    """
    return _whitened(inputs, _to_go(inputs, _centred(inputs)))


def rloo(inputs: AdvantageInputs) -> Advantages:
    """REINFORCE with the mean reward of the other samples of the prompt as baseline.

    Ahmadian et al., *Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in
    LLMs*, 2024, the RLOO estimator: ``R_i - sum over j != i of R_j / (k - 1)``.
    """
    others = max(inputs.group_size - 1, 1)
    return _to_go(inputs, _centred(inputs) * (inputs.group_size / others))


def group_norm(inputs: AdvantageInputs) -> Advantages:
    """The reward relative to the other samples of the prompt (GRPO).

    Shao et al., *DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models*, 2024, section
    4.1.2: ``(R_i - mean(R)) / std(R)`` over the group. The deviation has ``k - 1`` in its denominator, and 1e-6 is
    added to it; a group whose rewards are all alike gives 0.
    """
    centred = _centred(inputs)
    groups = centred.view(-1, inputs.group_size)
    spread = (groups.square().sum(1, keepdim=True) / max(inputs.group_size - 1, 1)).sqrt()
    return _to_go(inputs, (groups / (spread + _SMALL)).view(-1))


def dr_grpo(inputs: AdvantageInputs) -> Advantages:
    """The reward less the mean of the prompt's samples.

    Liu et al., *Understanding R1-Zero-Like Training: A Critical Perspective*, 2025, section 3.2:
    ``R_i - mean(R)``. The constant in place of the lengths is that of ``loss_aggregation="constant"``.
    """
    return _to_go(inputs, _centred(inputs))


def cpgd(inputs: AdvantageInputs) -> Advantages:
    """The reward less the mean of the prompt's samples, all prompts weighing the same.

    Liu et al., *CPGD: Toward Stable Rule-based Reinforcement Learning for Language Models*, 2025, the weighted
    advantage ``w * (R_i - mean(R))`` with equal weights ``w = 1``. What sets CPGD apart is ``policy_loss="cpgd"``.
    """
    return _to_go(inputs, _centred(inputs))


def _centred(inputs: AdvantageInputs) -> Tensor:
    """Rewards less the mean of their group, float64, in which it is exactly 0 where all are alike in float32."""
    groups = inputs.rewards.double().view(-1, inputs.group_size)
    return (groups - groups.mean(1, keepdim=True)).view(-1)


ADVANTAGES: dict[str, Callable[[AdvantageInputs], Advantages]] = {
    "gae": gae,
    "reinforce": reinforce,
    "rloo": rloo,
    "reinforce_baseline": reinforce_baseline,
    "reinforce++": reinforce_plus_plus,
    "group_norm": group_norm,
    "grpo": group_norm,
    "dr_grpo": dr_grpo,
    "cpgd": cpgd,
}
"""Every estimator by the name of its flag."""


def estimate(name: str, inputs: AdvantageInputs) -> Advantages:
    """The advantages by the estimator ``name``.

    Raises:
        ConfigError: there is no such estimator, or it lacks something.
    """
    if name not in ADVANTAGES:
        raise ConfigError(f"advantage_estimator={name!r}: expected one of {', '.join(ADVANTAGES)}")
    return ADVANTAGES[name](inputs)
