"""The prompts of a run, batch after batch, and where it goes on after it was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase

__all__ = ["PromptStream"]


class PromptStream:
    """Each rank's share of the prompts, in an order that follows from the seed, without an end.

    Args:
        strategy: whose data-parallel ranks share them.
        prompts: a map-style data set, the same on every rank.
        consumed: prompts that all ranks together have had already.

    Attributes:
        consumed: the same, until now.

    Raises:
        ConfigError: there are fewer prompts than ``rollout_batch_size``.
    """

    def __init__(self, strategy: StrategyBase, prompts: Any, consumed: int = 0) -> None:
        self.batch_size = strategy.config.rollout_batch_size
        if len(prompts) < self.batch_size:
            raise ConfigError(
                f"{len(prompts)} prompts with rollout_batch_size={self.batch_size}: expected enough for one iteration"
            )
        self.consumed = consumed
        self._loader = strategy.setup_dataloader(
            prompts, self.batch_size // strategy.groups.dp_size, collate_fn=list, consumed_samples=consumed
        )
        self._batches = self._endless()

    def take(self) -> list[Any]:
        """The next prompts of this rank."""
        batch = next(self._batches)
        self.consumed += self.batch_size
        return batch

    def _endless(self) -> Iterator[list[Any]]:
        while True:
            yield from self._loader
            self._loader.sampler.set_epoch(self._loader.sampler.epoch + 1)
