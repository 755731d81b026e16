"""What is done to rewards before advantages are computed of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightrft.errors import ConfigError

__all__ = ["RunningMoments", "clip_rewards", "informative_groups", "overlong_penalty"]


class RunningMoments:
    """Mean and standard deviation of all rewards there have been, over all ranks and iterations.

    Counts, means and squared deviations of batches are merged as in Chan, Golub and LeVeque, *Updating Formulae and a
    Pairwise Algorithm for Computing Sample Variances*, 1979.
    """

    def __init__(self) -> None:
        self.count = 0.0
        self.mean = 0.0
        self.squares = 0.0
        """Sum of the squared deviations from the mean."""

    @property
    def deviation(self) -> float:
        """The standard deviation of all rewards; 0 before there are two."""
        return float((self.squares / self.count) ** 0.5) if self.count > 1 else 0.0

    def update(self, rewards: Tensor, total: Callable[[Tensor], Tensor]) -> None:
        """Take in the rewards (batch,) of this rank; any number, none included. *Collective*: two small ones.

        Args:
            rewards: those that are no finite numbers are passed over.
            total: gives the sum of a tensor over data-parallel ranks.
        """
        known = rewards[rewards.isfinite()].double()
        sums = total(torch.stack([known.new_tensor(float(len(known))), known.sum()]))
        count, mean = sums[0].item(), (sums[1] / sums[0].clamp(min=1)).item()
        squares = total((known - mean).square().sum().unsqueeze(0)).item()
        if count:
            both = self.count + count
            shift = mean - self.mean
            self.squares += squares + shift**2 * self.count * count / both
            self.mean += shift * count / both
            self.count = both

    def normalised(self, rewards: Tensor) -> Tensor:
        """Rewards (batch,) less the mean, divided by the standard deviation, where there is one."""
        return (rewards - self.mean) / (self.deviation or 1.0)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint holds."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint held."""
        self.count, self.mean, self.squares = (float(state[name]) for name in ("count", "mean", "squares"))


def clip_rewards(rewards: Tensor, limit: float) -> Tensor:
    """Rewards between ``-limit`` and ``limit``; as they are if ``limit`` is 0."""
    return rewards.clamp(-limit, limit) if limit else rewards


def overlong_penalty(lengths: Tensor, longest: int, buffer: int, factor: float = 1.0) -> Tensor:
    """What is added to the reward of a sequence that comes near the largest length: the soft overlong punishment.

    Yu et al., *DAPO: An Open-Source LLM Reinforcement Learning System at Scale*, 2025, equation 13: 0 up to
    ``longest - buffer`` tokens, from there on falling to -1 at ``longest``, and -1 beyond; times ``factor``.

    Args:
        lengths: generated tokens of each sequence, shape (batch,).
        longest: most tokens that may be generated.
        buffer: over how many of them the penalty grows; 0 for no penalty.
        factor: the largest penalty.

    Returns:
        Shape (batch,), float32, 0 or negative.

    Raises:
        ConfigError: ``buffer`` is larger than ``longest``.
    """
    if buffer > longest:
        raise ConfigError(
            f"overlong_buffer_len={buffer} is larger than generate_max_len={longest}: expected at most that"
        )
    if not buffer:
        return torch.zeros(len(lengths), device=lengths.device)
    return -((lengths.float() - (longest - buffer)) / buffer).clamp(0, 1) * factor


def informative_groups(rewards: Tensor, group_size: int) -> Tensor:
    """Which sequences belong to a prompt whose samples did not all get the same reward.

    Of the others nothing can be learned by comparison: Yu et al., *DAPO*, 2025, equation 11, leaves them out (dynamic
    sampling).

    Args:
        rewards: shape (batch,); samples of one prompt are consecutive.
        group_size: samples of each prompt.

    Returns:
        A mask of shape (batch,): whole groups.
    """
    groups = rewards.view(-1, group_size)
    return (groups != groups[:, :1]).any(1).repeat_interleave(group_size)
