"""Measure while nobody else uses the processor, or as nearly so as this machine allows.

What other processes took during a measurement is what all processors were busy with, less what this process and its
children used. Measurements are chosen by that alone, never by their outcome.
"""

from __future__ import annotations

import os
import resource
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from benchmarks.groups import now

T = TypeVar("T")

REPETITIONS = 5
QUIET = 0.1
"""Share of one processor that others may take during a measurement without disturbing it."""

PATIENCE_S = 5.0
"""How long one measurement is taken again and again, in the hope of quiet."""

PATIENCE_IN_ALL_S = 50.0
"""The same, for all measurements of a session."""

LIMIT_S = 75.0
"""After this time a measurement is not taken again, even if it was taken fewer times than asked for."""

_IDLE = (3, 4)  # columns of /proc/stat: idle, waiting for a disk
_GUEST = 8  # from here on, time that is counted elsewhere as well


@dataclass
class _Session:
    kept: list[float] = field(default_factory=list)
    patience: float = PATIENCE_IN_ALL_S


_session = _Session()


def quietest(measure: Callable[[], T], repetitions: int = REPETITIONS) -> list[T]:
    """Results of ``measure``, taken ``repetitions`` times; of more, those that others disturbed least."""
    taken: list[tuple[float, int, T]] = []
    begin = now()
    patience = min(PATIENCE_S, _session.patience)
    while (len(taken) < repetitions and now() - begin < LIMIT_S) or (
        _disturbed(taken, repetitions) and now() - begin < patience
    ):
        started, others = now(), _others_seconds()
        result = measure()
        taken.append(((_others_seconds() - others) / (now() - started), len(taken), result))
        if len(taken) > repetitions:
            _session.patience -= now() - started
    kept = sorted(sorted(taken)[:repetitions], key=lambda entry: entry[1])
    _session.kept.extend(disturbance for disturbance, _, _ in kept)
    return [result for _, _, result in kept]


def disturbance() -> tuple[float, float]:
    """Median and maximum of the share of one processor that others took during what was kept."""
    return statistics.median(_session.kept), max(_session.kept)


def _disturbed(taken: list[tuple[float, int, T]], repetitions: int) -> bool:
    return sum(share < QUIET for share, _, _ in taken) < repetitions


def _others_seconds() -> float:
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    busy = sum(tick for column, tick in enumerate(ticks[:_GUEST]) if column not in _IDLE)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy / os.sysconf("SC_CLK_TCK") - sum(usage.ru_utime + usage.ru_stime for usage in usages)
