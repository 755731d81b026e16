"""``all_reduce`` and ``all_gather`` of tensors, numbers, and dicts of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.errors import ConfigError
from lightrft.strategy.utils.gathering import Gathering
from lightrft.strategy.utils.leaves import Leaf, flatten, members, rebuild
from lightrft.strategy.utils.reduction import Reduction, is_integer

__all__ = ["OPS", "all_gather", "all_reduce"]

OPS = ("mean", "max", "min", "sum")


def all_reduce(
    data: Any,
    op: str = "mean",
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Reduce ``data`` over the ranks of ``group``, value by value. The input is not modified.

    Every rank gives the same keys, types, shapes and dtypes; their order in a dict does not matter. Without a process
    group there is one rank.

    Args:
        data: a tensor, a number, or a dict of these, which may be nested.
        op: ``mean``, ``max``, ``min`` or ``sum``. Half precision is reduced in float32. A NaN on any rank gives NaN.
        group: the default group if None.
        device: where the backend of the group wants its tensors.

    Returns:
        the same structure on every rank. Tensors keep shape, dtype and device, without autograd's history; the mean of
        integers and booleans is float32, the sum of booleans int64. Python numbers stay Python numbers: the mean is a
        float, other results keep the type, but the sum of booleans is an int.

    Raises:
        ConfigError: ``op`` is unknown, ``data`` is of another type, a complex number has to be ordered, or the ranks
            hold different values. The last is raised on every rank, and names the keys.
    """
    if op not in OPS:
        raise ConfigError(f"op={op!r} is unknown: expected one of {', '.join(OPS)}")
    world = members(group)
    leaves = flatten(data)
    with torch.no_grad():
        reduced = Reduction(leaves, op, world, group, torch.device(device)).run()
        return rebuild(data, {leaf.path: _finish(leaf, reduced[leaf.path], op, world) for leaf in leaves})


def all_gather(
    data: Any,
    *,
    group: dist.ProcessGroup | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Gather ``data`` from the ranks of ``group``, value by value, in rank order. The input is not modified.

    Every rank gives the same keys, types and dtypes, and shapes that agree but for the first dimension. Without a
    process group there is one rank. It takes two small collectives at most, and one for the values.

    Args:
        data: a tensor, a number, or a dict of these, which may be nested.
        group: the default group if None.
        device: where the backend of the group wants its tensors.

    Returns:
        the same structure on every rank. Tensors are concatenated along their first dimension, which may differ from
        rank to rank; those of no dimension, and Python numbers, are stacked to shape ``(world,)`` (a float becomes
        float64, an int int64, a bool bool). Results lie where the input tensor lies, numbers on the CPU, without
        autograd's history.

    Raises:
        ConfigError: ``data`` is of another type, or the ranks hold different values. The last is raised on every
            rank, and names the keys.
    """
    world = members(group)
    leaves = flatten(data)
    with torch.no_grad():
        gathered = Gathering(leaves, world, group, torch.device(device)).run()
        return rebuild(data, gathered)


def _finish(leaf: Leaf, total: Tensor, op: str, world: int) -> Any:
    """The result for ``leaf`` from what was reduced: flat, a sum where a mean was asked for."""
    value = leaf.value
    if op == "mean":
        total = (total.double() if not total.is_floating_point() and not total.is_complex() else total) / world
    if not isinstance(value, Tensor):
        number = total.item()
        return bool(number) if isinstance(value, bool) and op in ("max", "min") else number
    dtype = value.dtype
    if is_integer(leaf, op) and op == "mean":
        dtype = torch.float32
    elif dtype == torch.bool and op == "sum":
        dtype = torch.int64
    return total.reshape(value.shape).to(value.device, dtype, copy=True)
