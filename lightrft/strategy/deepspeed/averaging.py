"""Moving averages of weights."""

from __future__ import annotations

import torch

from lightrft.errors import ConfigError
from lightrft.strategy.deepspeed.parameters import gathered, is_partitioned, shape_of

__all__ = ["move_towards"]


@torch.no_grad()
def move_towards(source: torch.nn.Module, target: torch.nn.Module, *, beta: float, device: torch.device) -> None:
    """Make the weights of ``target`` ``beta * target + (1 - beta) * source``. *Collective*.

    Args:
        source: partitioned or not.
        target: partitioned, or whole on each rank, of the same parameters.
        beta: from 0 to 1.
        device: where the average is computed if ``target`` is whole.

    Raises:
        ConfigError: the parameters differ.
    """
    ours, theirs = dict(source.named_parameters()), dict(target.named_parameters())
    if {n: shape_of(p) for n, p in ours.items()} != {n: shape_of(p) for n, p in theirs.items()}:
        raise ConfigError(
            f"moving_average of {type(source).__name__} into {type(target).__name__}: they have other parameters; "
            "make the second one a copy of the first"
        )
    for name, parameter in ours.items():
        average = theirs[name]
        where = average.device if is_partitioned(average) else device
        with gathered([parameter]), gathered([average], written_by=0):
            value = average.data.to(where, torch.float32).lerp(parameter.data.to(where, torch.float32), 1 - beta)
            average.data.copy_(value)
