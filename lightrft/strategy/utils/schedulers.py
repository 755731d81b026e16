"""Schedules of learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lightrft.strategy.config import StrategyConfig

__all__ = ["SCHEDULES", "make"]

_FLOOR = 0.1


def _constant(progress: float) -> float:  # noqa: ARG001 - one signature for all schedules
    return 1.0


def _linear(progress: float) -> float:
    return 1 - progress


def _cosine_with_min_lr(progress: float) -> float:
    """Cosine annealing, Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5, without restarts."""
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine_with_min_lr": _cosine_with_min_lr,
}
"""Share of the peak learning rate, by how far the run is from its peak (0) to its end (1)."""


def make(optimizer: torch.optim.Optimizer, config: StrategyConfig, max_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule that ``config.lr_scheduler`` names, after a linear warm-up.

    The warm-up takes ``ceil(max_steps * config.lr_warmup_ratio)`` steps: the rate of the *k*-th is *k* parts of the
    peak, so that none is at 0 and the last is at the peak. From there ``linear`` falls to 0, and ``cosine_with_min_lr``
    to a tenth of the peak, where they are once ``max_steps`` steps are done, and stay.

    Args:
        optimizer: its present learning rates are the peaks.
        config: ``lr_scheduler`` and ``lr_warmup_ratio``.
        max_steps: optimizer steps of the run.

    Raises:
        ConfigError: ``max_steps`` is below 1.
    """
    import torch

    if max_steps < 1:
        raise ConfigError(f"max_steps is {max_steps}: expected the number of optimizer steps of the run, at least 1")
    warm_up = math.ceil(max_steps * config.lr_warmup_ratio)
    share = _share(SCHEDULES[config.lr_scheduler], warm_up, max_steps)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def _share(schedule: Callable[[float], float], warm_up: int, max_steps: int) -> Callable[[int], float]:
    """Share of the peak, by step from 0. A function, which ``LambdaLR`` does not save: settings come anew."""
    peak = max(0, warm_up - 1)

    def share(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return schedule(min((step - peak) / (max_steps - peak), 1.0))

    return share
