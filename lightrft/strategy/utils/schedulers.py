"""Schedules of learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from lightrft.strategy.config import StrategyConfig

__all__ = ["SCHEDULES", "make"]


def _constant(progress: float, floor: float) -> float:  # noqa: ARG001 - one signature for all schedules
    return 1.0


def _linear(progress: float, floor: float) -> float:
    return floor + (1 - floor) * (1 - progress)


def _cosine(progress: float, floor: float) -> float:
    """Cosine annealing, Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5, without restarts."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine_with_min_lr": _cosine,
}
"""Share of the peak learning rate, by how far the run is after warm-up (0 to 1) and the share that it ends at."""


def make(
    optimizer: torch.optim.Optimizer, config: StrategyConfig, max_steps: int, *, floor: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule that ``config.lr_scheduler`` names, after a linear warm-up.

    Args:
        optimizer: its present learning rates are the peaks.
        config: ``lr_scheduler`` and ``lr_warmup_ratio``.
        max_steps: optimizer steps of the run; afterwards the rate stays where it ended.
        floor: share of the peak at the end.

    Raises:
        ConfigError: there is no such schedule, or ``max_steps`` is below 1.
    """
    if config.lr_scheduler not in SCHEDULES:
        raise ConfigError(f"lr_scheduler {config.lr_scheduler!r}: expected one of {', '.join(SCHEDULES)}")
    if max_steps < 1:
        raise ConfigError(f"max_steps is {max_steps}: expected the number of optimizer steps of the run, at least 1")
    warm_up = math.ceil(max_steps * config.lr_warmup_ratio)
    share = _share(SCHEDULES[config.lr_scheduler], warm_up, max_steps, floor)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _share(
    schedule: Callable[[float, float], float], warm_up: int, max_steps: int, floor: float
) -> Callable[[int], float]:
    """Share of the peak, by step. A function, which ``LambdaLR`` leaves out of what is saved: settings come anew."""

    def share(step: int) -> float:
        if step < warm_up:
            return step / warm_up
        progress = (step - warm_up) / max(1, max_steps - warm_up)
        return schedule(min(progress, 1.0), floor)

    return share
