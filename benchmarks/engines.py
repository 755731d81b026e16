"""The fake engine: prompts on their way through it, its tokens a second, and what new weights cost."""

from __future__ import annotations

import functools
import statistics

from benchmarks.groups import in_fresh_process
from benchmarks.quiet import quietest

REPETITIONS = 3

FACES = {"vllm": "vLLM", "sglang": "SGLang"}
SPREADS = ("uniform", "log-uniform")


@functools.cache
def rollout(engine: str) -> list[dict[str, float]]:
    """See ``engines_child.rollout``."""
    return quietest(lambda: in_fresh_process("engines_child", "rollout", engine), REPETITIONS)


@functools.cache
def generation(spread: str) -> list[dict[str, float]]:
    """See ``engines_child.generation``."""
    return quietest(lambda: in_fresh_process("engines_child", "generation", spread), REPETITIONS)


@functools.cache
def update(engine: str) -> list[dict[str, float]]:
    """See ``engines_child.update``."""
    return quietest(lambda: in_fresh_process("engines_child", "update", engine), REPETITIONS)


def median(runs: list[dict[str, float]], key: str) -> float:
    """The median of ``key`` over several runs."""
    return statistics.median(run[key] for run in runs)
