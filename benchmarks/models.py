"""What fusing the output layer with log-probs, and packing samples, save."""

from __future__ import annotations

import functools
import statistics

from benchmarks.groups import in_fresh_process
from benchmarks.quiet import quietest

REPETITIONS = 3


@functools.cache
def output(way: str) -> dict[str, float]:
    """Seconds and MiB of log-probs of 4096 tokens among 150,000, and of their gradients: ``plain`` or ``fused``."""
    runs = quietest(lambda: in_fresh_process("models_child", "output", way), 1)  # it takes half a minute
    return {key: statistics.median(run[key] for run in runs) for key in ("seconds", "mib")}


def fused(key: str) -> float:
    """What of ``key`` the fused way takes, as a fraction of the plain one."""
    return output("fused")[key] / output("plain")[key]


@functools.cache
def packing() -> list[dict[str, float]]:
    """Seconds of a step on samples of many lengths, ``padded`` and ``packed``, and their ``ratio``, for some runs."""
    return quietest(lambda: in_fresh_process("models_child", "packing"), REPETITIONS)
