"""The experiences of one iteration on one rank, dealt out to optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lightrft.trainer.experience import Experience

__all__ = ["ReplayBuffer"]


class ReplayBuffer:
    """Keeps each sequence without padding, and makes micro-batches of them.

    Attributes:
        filler: a sequence with an image, for micro-batches without any; ``None`` where models see nothing.
    """

    def __init__(self) -> None:
        self._rows: list[Experience] = []
        self.filler: Experience | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def extend(self, experiences: Iterable[Experience]) -> None:
        """Take in the sequences of batches."""
        self._rows.extend(batch.row(place) for batch in experiences for place in range(len(batch)))

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self.filler = None

    def steps_needed(self, micro_batch_size: int, micro_batches: int) -> int:
        """Optimizer steps that this rank needs to see each sequence once."""
        return -(-len(self._rows) // (micro_batch_size * micro_batches))

    def steps(
        self, count: int, *, micro_batch_size: int, micro_batches: int, seed: int, device: torch.device | str = "cpu"
    ) -> list[list[Experience]]:
        """The micro-batches of each of ``count`` optimizer steps: every sequence once, in an order that ``seed`` gives.

        Ranks with different numbers of sequences ask for the same ``count``, the largest that one needs. What has
        nothing left gets placeholders, so that every rank passes through the models equally often.

        Args:
            count: optimizer steps, at least ``steps_needed``.
            micro_batch_size: largest number of sequences of a micro-batch.
            micro_batches: of one optimizer step.
            seed: of the order.
            device: of placeholders.
        """
        order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(seed)).tolist()
        batches = [
            Experience.joined([self._rows[place] for place in order[first : first + micro_batch_size]])
            for first in range(0, len(order), micro_batch_size)
        ]
        batches += [Experience.placeholder(device)] * (count * micro_batches - len(batches))
        batches = [batch.with_filler(self.filler) for batch in batches]
        return [batches[step * micro_batches : (step + 1) * micro_batches] for step in range(count)]
