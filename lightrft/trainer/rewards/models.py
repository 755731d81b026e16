"""Rewards by a reward model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightrft.errors import ConfigError
from lightrft.trainer.experience import Sample, join_images, padded
from lightrft.trainer.fillers import image_filler
from lightrft.trainer.rewards.source import Rewards, RewardSource, Scored

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase

__all__ = ["ModelReward"]


class ModelReward(RewardSource):
    """Asks a model that gives a number for each sequence: ``model(sequences, attention_mask)`` of shape (batch,).

    It may be spread over the ranks, and then all ranks have to pass through it equally often: those with fewer samples
    pass something empty through it.

    Args:
        model: as the strategy has prepared it.
        strategy: which has prepared it.
        micro_batch_size: sequences of one forward pass.
        offload: keep its weights on the CPU while it is not asked. *Collective*, as each call is.
        name: by which it is reported.
    """

    is_collective = True

    def __init__(
        self,
        model: nn.Module,
        strategy: StrategyBase,
        *,
        micro_batch_size: int,
        offload: bool = False,
        name: str = "reward_model",
    ) -> None:
        self.name = name
        self._model = model
        model.eval()  # of DeepSpeed it returns nothing
        self._strategy = strategy
        self._micro_batch_size = micro_batch_size
        self._offload = offload
        if offload:
            strategy.offload_model(model)

    def __call__(self, samples: Scored) -> Rewards:
        """See ``RewardSource``. *Collective*."""
        batches = [
            samples[first : first + self._micro_batch_size] for first in range(0, len(samples), self._micro_batch_size)
        ]
        rounds = self._strategy.all_reduce(len(batches), op="max")
        filler = image_filler(samples, self._strategy)
        if self._offload:
            self._strategy.reload_model(self._model)
        try:
            with torch.no_grad():
                scores = [self._scores(batch, filler) for batch in [*batches, *[()] * (rounds - len(batches))]]
        finally:
            if self._offload:
                self._strategy.offload_model(self._model)
        return Rewards(rewards=torch.cat([torch.zeros(0), *scores]))

    def _scores(self, batch: Sequence[Sample], filler: Sample | None) -> Tensor:
        """Of the samples of one forward pass; without any, the model sees two tokens that mean nothing."""
        seen = [*batch, filler] if filler is not None and not any(one.images for one in batch) else batch
        rows = [one.tokens for one in seen] or [(0, 0)]
        length = max(len(row) for row in rows)
        device = self._strategy.device
        found = self._model(
            padded(rows, length, torch.int64).to(device),
            padded([[1] * len(row) for row in rows], length, torch.int64).to(device),
            **{name: tensor.to(device) for name, tensor in join_images([one.images for one in seen]).items()},
        )
        if not isinstance(found, Tensor) or found.numel() != len(rows):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(
                f"the reward model {type(self._model).__name__} returned {shape} for {len(rows)} sequences: expected a "
                "tensor of shape (batch,)"
            )
        return found.reshape(-1).float().cpu()[: len(batch)]
