"""Means over all ranks of what happens in an iteration, and how long its phases take."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase

__all__ = ["Means", "Stopwatch", "now"]


class Means:
    """Collects sums and counts by name; ``over_ranks`` divides those of all ranks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, name: str, total: Tensor | float, count: Tensor | float = 1) -> None:
        """Add ``total``, which is the sum of ``count`` values; nothing waits for the device."""
        total, count = (torch.as_tensor(each).detach().double() for each in (total, count))
        self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._counts[name] = self._counts[name] + count if name in self._counts else count

    def add_all(self, found: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add a sum and a count for each name."""
        for name, (total, count) in found.items():
            self.add(name, total, count)

    def expect(self, names: Iterable[str]) -> None:
        """These names are there, also where nothing was added to them: all ranks need the same ones."""
        for name in names:
            self.add(name, 0.0, 0.0)

    def over_ranks(self, strategy: StrategyBase) -> dict[str, float]:
        """The mean of each, by name; 0 where nothing was added on any rank. *Collective*, one for all of them."""
        names = sorted(self._sums)
        both = [torch.stack([each[name].cpu() for name in names]) for each in (self._sums, self._counts) if names]
        totals, counts = strategy.all_reduce(torch.stack(both), op="sum") if both else ([], [])
        return {name: float(total / max(count, 1)) for name, total, count in zip(names, totals, counts, strict=True)}


def now() -> float:
    """Real seconds from some time on, on simulated ranks too, whose other clocks are virtual."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class Stopwatch:
    """Measures the phases of an iteration on this rank, by name, in seconds.

    Simulated ranks take turns, so the time of a phase is that of all of them.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The time that this takes counts for ``name``."""
        begin = now()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + now() - begin

    def taken(self) -> dict[str, float]:
        """What was measured, by ``time/<name>``; it begins anew."""
        found, self.seconds = self.seconds, {}
        return {f"time/{name}": seconds for name, seconds in found.items()}
