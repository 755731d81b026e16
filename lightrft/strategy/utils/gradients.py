"""The norm of all gradients together, and clipping by it, for whole and sharded parameters alike."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from lightrft.errors import ConfigError
from lightrft.strategy.utils.leaves import members

__all__ = ["clip_by_global_norm", "global_norm"]

_EPSILON = 1e-6
"""What ``torch.nn.utils.clip_grad_norm_`` adds to the norm before it divides by it."""


def global_norm(
    parameters: Iterable[Tensor], norm_type: float = 2.0, *, group: dist.ProcessGroup | None = None
) -> float:
    """The norm of the gradients of all parameters, as if they were one vector.

    Every rank calls it with the same parameters: whole tensors, whose gradients are equal on all ranks, and DTensors of
    any meshes and placements, mixed. It takes one small collective if a parameter is sharded, and none
    otherwise. (A gradient that is a partial sum, which FSDP never leaves, takes a collective of its own.)

    Args:
        parameters: those without a gradient count as zero.
        norm_type: the p of the p-norm, positive; ``math.inf`` for the largest magnitude.
        group: all ranks that hold parts of the parameters; the default group if None.

    Raises:
        ConfigError: ``norm_type`` is not positive.
    """
    if not norm_type > 0:
        raise ConfigError(f"norm_type={norm_type!r}: expected a positive number, or math.inf")
    with torch.no_grad():
        return _norm(list(dict.fromkeys(parameters)), norm_type, group)


def clip_by_global_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    group: dist.ProcessGroup | None = None,
) -> float:
    """Scale all gradients, in place, so that their global norm is at most ``max_norm``.

    Args:
        parameters: see :func:`global_norm`; of all optimizers and parameter groups together.
        max_norm: 0 never clips.
        norm_type: see :func:`global_norm`.
        group: see :func:`global_norm`.

    Returns:
        the norm before clipping, the same on every rank. If it is not finite, the gradients are left alone.

    Raises:
        ConfigError: ``max_norm`` is negative or no number.
    """
    if not max_norm >= 0:
        raise ConfigError(f"max_norm={max_norm!r}: expected 0 (no clipping) or a positive number")
    parameters = list(dict.fromkeys(parameters))
    norm = global_norm(parameters, norm_type, group=group)
    scale = max_norm / (norm + _EPSILON)
    if max_norm > 0 and math.isfinite(norm) and scale < 1:
        with torch.no_grad():
            for gradients in _alike(_local(p.grad) for p in parameters if p.grad is not None):
                torch._foreach_mul_(gradients, scale)
    return norm


def _norm(parameters: Sequence[Tensor], norm_type: float, group: dist.ProcessGroup | None) -> float:
    world = members(group)
    meshes = [p.device_mesh for p in parameters if isinstance(p, DTensor)] if world > 1 else []
    gradients = [_without_partial_sums(p.grad) for p in parameters if p.grad is not None]
    total = torch.zeros((), dtype=torch.float64, device=meshes[0].device_type if meshes else "cpu")
    for copies, tensors in _by_copies(gradients, world if meshes else 1).items():
        part = _power(tensors, norm_type).to(total.device)
        total = torch.maximum(total, part) if norm_type == math.inf else total + part / copies
    if meshes:
        total = _over_ranks(total, norm_type, group)
    return total.item() if norm_type == math.inf else total.item() ** (1 / norm_type)


def _over_ranks(total: Tensor, norm_type: float, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over ranks; for infinity the maximum, beside which a mark tells of NaN, which gloo may drop from one."""
    if norm_type != math.inf:
        dist.all_reduce(total, group=group)
        return total
    marked = torch.stack([total.nan_to_num(nan=0.0, posinf=math.inf), total.isnan().double()])
    dist.all_reduce(marked, dist.ReduceOp.MAX, group=group)
    return marked[0].masked_fill(marked[1] > 0, math.nan)


def _by_copies(gradients: Iterable[Tensor], world: int) -> dict[float, list[Tensor]]:
    """What this rank holds of the gradients, by the number of ranks that hold the same.

    In a world of 4, a whole gradient has 4 copies, a shard on a 1-D mesh of 4 one, and a shard on a 2-D mesh that
    replicates over 2 and shards over 2 has two. So has a shard on a mesh of 2 of which each half of the world has one.
    """
    found: dict[float, list[Tensor]] = {}
    for gradient in gradients:
        shards = 1
        if isinstance(gradient, DTensor):
            dimensions = enumerate(gradient.placements)
            shards = math.prod(gradient.device_mesh.size(i) for i, kind in dimensions if not kind.is_replicate())
        found.setdefault(world / shards, []).append(_local(gradient))
    return found


def _power(tensors: Iterable[Tensor], norm_type: float) -> Tensor:
    """The norm of all tensors to the power of ``norm_type`` (the norm itself for infinity), float64."""
    norms = [
        torch.stack(torch._foreach_norm(alike, norm_type, dtype=max(alike[0].dtype, torch.float32, key=_bytes)))
        for alike in _alike(tensor for tensor in tensors if tensor.numel())
    ]
    each = torch.cat([part.to(norms[0].device, torch.float64) for part in norms] or [torch.zeros(1)])
    return each.max() if norm_type == math.inf else each.pow(norm_type).sum()


def _bytes(dtype: torch.dtype) -> int:
    return dtype.itemsize


def _alike(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors of one device and dtype together, as the fused operations want them."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(found.values())


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _without_partial_sums(gradient: Tensor) -> Tensor:
    if not isinstance(gradient, DTensor) or not any(kind.is_partial() for kind in gradient.placements):
        return gradient
    return gradient.redistribute(
        placements=[Replicate() if kind.is_partial() else kind for kind in gradient.placements]
    )
