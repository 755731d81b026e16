"""Collectives of a sequence-parallel group that have a gradient, and work on sub-groups of every backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist

__all__ = ["exchange", "gather_sequence"]


class _AllToAll(torch.autograd.Function):
    """Row ``j`` of rank ``i`` becomes row ``i`` of rank ``j``. That is its own inverse and its own transpose."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        received = torch.empty_like(rows)
        dist.all_to_all_single(received, rows, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(gradients[0].contiguous(), ctx.group), None


def _all_to_all(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    return cast("torch.Tensor", _AllToAll.apply(rows, group))  # type: ignore[no-untyped-call]


def exchange(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Split dimension 1 over the ranks, and join dimension 2 from the ranks, in one collective and with gradient.

    Args:
        tensors: each of shape (batch, n * size, m, ...), of one dtype; ``size`` is that of the group.
        group: the ranks, each of which passes tensors of these shapes.

    Returns:
        Each tensor with shape (batch, n, m * size, ...). For heads in dimension 1 and tokens in dimension 2 that is
        this rank's heads for all tokens; for tokens in dimension 1 and heads in dimension 2 it is the way back.
    """
    size = dist.get_world_size(group)
    parts = [tensor.unflatten(1, (size, -1)).movedim(1, 0) for tensor in tensors]
    rows = torch.cat([part.flatten(1) for part in parts], dim=1)
    received = _all_to_all(rows, group).split([part[0].numel() for part in parts], dim=1)
    return [
        row.unflatten(1, part.shape[1:]).movedim(0, 2).flatten(2, 3) for row, part in zip(received, parts, strict=True)
    ]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.size, ctx.rank = dist.get_world_size(group), dist.get_rank(group)
        pieces = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(ctx.size)]
        dist.all_gather(pieces, values.contiguous(), group=group)
        return torch.cat(pieces, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0].chunk(ctx.size, dim=1)[ctx.rank] * ctx.size, None


def gather_sequence(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The values of all slices, in the order of the ranks, with gradient.

    The gradient that arrives at a rank's slice is this rank's slice of its own gradient, TIMES the size of the group.
    No communication is needed because every rank of the group computes the same loss of the gathered values.

    Why times the size: let ``v_r`` be what rank ``r`` of a group of ``S`` ranks puts in, ``l`` the loss of the group.
    Each rank starts its backward with ``S * dl/dv_r``, and the all-to-alls carry every gradient to the rank that
    holds the activation, so the parameter gradients ``g_r`` of the ranks add up to ``S * dl/dw``. Training averages
    over all ``W = S * D`` ranks of ``D`` groups: ``1/W * sum over groups and r of g_r = 1/D * sum over groups of
    dl/dw``, which is the mean over the ``D`` data-parallel losses, as without sequence parallelism. A term of the loss
    that does not come through here, and is the same on all ranks of the group, is right as it is.

    Args:
        values: shape (batch, local length, ...), the same on every rank of the group.
        group: the ranks that hold the slices.

    Returns:
        Shape (batch, local length * size, ...).
    """
    return cast("torch.Tensor", _Gather.apply(values, group))  # type: ignore[no-untyped-call]
