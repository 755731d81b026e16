"""What strategies cost beside the backends written directly, and the fake one beside a real one."""

from __future__ import annotations

import functools
import statistics

from benchmarks.groups import in_fresh_process
from benchmarks.quiet import quietest

REPETITIONS = 3

BACKENDS = ("FSDP2", "ZeRO-2", "ZeRO-3")
RANKS = (1, 4)


@functools.cache
def overhead(backend: str, ranks: int) -> list[dict[str, float]]:
    """Milliseconds of processor time of a step, ``direct`` and by ``strategy``, and their ``ratio``, for some runs."""
    return quietest(lambda: in_fresh_process("strategies_child", "overhead", backend, str(ranks)), REPETITIONS)


@functools.cache
def fake() -> list[dict[str, float]]:
    """Milliseconds of a step of 8 ranks: ``fake`` and ``real`` (FSDP2), measured in turns, and their ``ratio``."""

    def in_turns() -> dict[str, float]:
        found: dict[str, float] = {
            name: in_fresh_process("strategies_child", "fake", name) for name in ("fake", "real")
        }
        return {**found, "ratio": found["fake"] / found["real"]}

    return quietest(in_turns, REPETITIONS)


@functools.cache
def metrics() -> dict[str, float]:
    """Collectives for 30 metrics: as one ``dict``, and one by one (``single``)."""
    found: dict[str, float] = in_fresh_process("strategies_child", "metrics")
    return found


def median(runs: list[dict[str, float]], key: str) -> float:
    """The median of ``key`` over several runs."""
    return statistics.median(run[key] for run in runs)
