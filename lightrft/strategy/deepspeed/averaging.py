"""Moving averages of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.errors import ConfigError
from lightrft.strategy.deepspeed.parameters import gathered, is_partitioned, shape_of
from lightrft.strategy.utils import moving_average

if TYPE_CHECKING:
    import torch

__all__ = ["move_towards"]


def move_towards(source: torch.nn.Module, target: torch.nn.Module, *, beta: float, device: torch.device) -> None:
    """Make the weights of ``target`` ``beta * target + (1 - beta) * source``, and its buffers those. *Collective*.

    Args:
        source: partitioned or not.
        target: partitioned, or whole on each rank, of the same parameters.
        beta: from 0 to 1.
        device: where the average is computed if ``target`` is whole.

    Raises:
        ConfigError: the parameters differ, or ``beta`` is out of range.
    """
    ours, theirs = dict(source.named_parameters()), dict(target.named_parameters())
    if {n: shape_of(p) for n, p in ours.items()} != {n: shape_of(p) for n, p in theirs.items()}:
        raise ConfigError(
            f"moving_average of {type(source).__name__} into {type(target).__name__}: expected the same names and "
            "shapes of parameters; make the second one a copy of the first"
        )
    for name, parameter in ours.items():
        average = theirs[name]
        where = average.device if is_partitioned(average) else device
        with gathered([parameter]), gathered([average], written_by=0):
            moving_average.update([(name, parameter.data)], [(name, average.data)], beta, where)
    moving_average.copy_buffers(source.named_buffers(), target.named_buffers())
