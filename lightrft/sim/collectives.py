"""What each collective computes: every member's tensors in, every member's results out. Pure functions.

``inputs[m]`` is the list of tensors that member ``m`` of the group contributed; the result for member ``m`` is the list
of tensors to copy into its outputs, in order. Results may be shared between members, who only read them; they never
share memory with an input, because its owner may go on and change it before the others have read theirs.

Reductions start with the first member's tensor and add the others one by one, in the tensor's own dtype: the result is
the same for every schedule. Other orders (:data:`ORDERS`) show how far a program depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

__all__ = [
    "ORDERS",
    "all_gather",
    "all_gather_single",
    "all_reduce",
    "all_to_all",
    "all_to_all_single",
    "reduce_scatter",
]

ORDERS = ("rank", "ring", "tree", "permuted")
"""Orders of reduction: by rank, as a ring does (each chunk starts at another rank), pairwise, at random from a seed."""

_BLOCK = 1 << 15
"""Elements reduced at a time: a block of the accumulator stays in the processor's cache."""

Tensors = Sequence[Tensor]
Inputs = Sequence[Tensors]


def _combine(name: str) -> Callable[[Tensor, Tensor], object]:
    return {
        "SUM": torch.Tensor.add_,
        "AVG": torch.Tensor.add_,
        "PREMUL_SUM": torch.Tensor.add_,
        "PRODUCT": torch.Tensor.mul_,
        "MIN": lambda a, b: torch.minimum(a, b, out=a),
        "MAX": lambda a, b: torch.maximum(a, b, out=a),
        "BAND": torch.Tensor.bitwise_and_,
        "BOR": torch.Tensor.bitwise_or_,
        "BXOR": torch.Tensor.bitwise_xor_,
    }[name]


def reduce(tensors: Tensors, op: str, order: str = "rank", seed: int = 0, factor: float = 1.0) -> Tensor:
    """Combine tensors of one dtype and number of elements into a new tensor, which has the shape of the first.

    Args:
        tensors: one per member, in rank order.
        op: name of the ``ReduceOp``: SUM, AVG, PRODUCT, MIN, MAX, BAND, BOR, BXOR or PREMUL_SUM.
        order: one of :data:`ORDERS`.
        seed: draws the permutation of order ``permuted``.
        factor: what every tensor is multiplied by first, for PREMUL_SUM.
    """
    shape = tensors[0].shape
    if any(tensor.shape != shape for tensor in tensors):
        tensors = [tensor.detach().reshape(shape) for tensor in tensors]
    if order == "permuted":
        tensors = Random(seed).sample(list(tensors), len(tensors))
    if op == "PREMUL_SUM":
        tensors = [tensor.detach() * factor for tensor in tensors]
    if tensors[0].is_floating_point() and tensors[0].element_size() == 1:
        return _reduce_fp8(tensors, op, order)
    result = _ordered(tensors, _combine(op), order)
    if op == "AVG":
        _divide(result, len(tensors))
    return result


def _divide(result: Tensor, count: int) -> None:
    if result.is_floating_point() or result.is_complex():
        result.div_(count)
    else:
        result.div_(count, rounding_mode="trunc")


def _ordered(tensors: Tensors, combine: Callable[[Tensor, Tensor], object], order: str) -> Tensor:
    if order == "tree":
        return _tree(tensors, combine)
    if order == "ring":
        return _ring(tensors, combine)
    result = _copy(tensors[0])
    if result.numel() <= 2 * _BLOCK:
        if combine is torch.Tensor.add_ and len(tensors) > 1:
            torch._foreach_add_([result] * (len(tensors) - 1), list(tensors[1:]))  # one after the other, in one call
            return result
        for tensor in tensors[1:]:
            combine(result, tensor)
        return result
    flat = result.view(-1)
    others = [t.detach().reshape(-1) for t in tensors[1:]]
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        for other in others:
            combine(block, other[start : start + _BLOCK])
    return result


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _tree(tensors: Tensors, combine: Callable[[Tensor, Tensor], object]) -> Tensor:
    level = [_copy(tensor) for tensor in tensors]
    while len(level) > 1:
        for left, right in zip(level[::2], level[1::2], strict=False):
            combine(left, right)
        level = level[::2]
    return level[0]


def _ring(tensors: Tensors, combine: Callable[[Tensor, Tensor], object]) -> Tensor:
    size = len(tensors)
    chunks = [tensor.detach().reshape(-1).tensor_split(size) for tensor in tensors]
    result = []
    for position in range(size):
        target = chunks[(position + 1) % size][position].clone()
        for step in range(2, size + 1):
            combine(target, chunks[(position + step) % size][position])
        result.append(target)
    return torch.cat(result).view(tensors[0].shape)


def _reduce_fp8(tensors: Tensors, op: str, order: str) -> Tensor:
    dtype = tensors[0].dtype
    combine = _combine(op)

    def rounded(left: Tensor, right: Tensor) -> None:
        combine(left, right)
        left.copy_(left.to(dtype))

    result = _ordered([t.detach().float() for t in tensors], rounded, order)
    if op == "AVG":
        result.div_(len(tensors))
    return result.to(dtype)


Reduction = Callable[[Tensors], Tensor]


def _copies(tensors: Tensors) -> Tensors:
    """Contiguous copies, parts of one new tensor if the shapes agree."""
    shape = tensors[0].shape
    if len(tensors) > 1 and all([tensor.shape == shape for tensor in tensors]):  # noqa: C419 - faster as a list
        return torch.stack([tensor.detach() for tensor in tensors]).unbind(0)
    return [_copy(tensor) for tensor in tensors]


def all_reduce(inputs: Inputs, reduction: Reduction) -> list[Tensors]:
    """Everybody's result is the reduction of everybody's tensors, position by position."""
    result = [reduction(column) for column in zip(*inputs, strict=True)]
    return [result] * len(inputs)


def reduce_to(inputs: Inputs, reduction: Reduction, root: int) -> list[Tensors]:
    """As :func:`all_reduce`, for ``root`` alone."""
    result = [reduction(column) for column in zip(*inputs, strict=True)]
    return [result if member == root else () for member in range(len(inputs))]


def broadcast(inputs: Inputs, root: int) -> list[Tensors]:
    """Everybody's result is what ``root`` contributed."""
    copies = _copies(inputs[root])
    return [() if member == root else copies for member in range(len(inputs))]


def all_gather(inputs: Inputs) -> list[Tensors]:
    """Everybody receives everybody's tensor, in rank order."""
    gathered = _copies([tensors[0] for tensors in inputs])
    return [gathered] * len(inputs)


def all_gather_lists(inputs: Inputs) -> list[Tensors]:
    """As :func:`all_gather` for several tensors: all of the first member, then all of the second, and so on."""
    gathered = _copies([tensor for tensors in inputs for tensor in tensors])
    return [gathered] * len(inputs)


def all_gather_single(inputs: Inputs) -> list[Tensors]:
    """Everybody receives everybody's tensors end to end, position by position."""
    gathered = [torch.cat([t.detach().reshape(-1) for t in column]) for column in zip(*inputs, strict=True)]
    return [gathered] * len(inputs)


def gather(inputs: Inputs, root: int) -> list[Tensors]:
    """``root`` receives everybody's tensor, in rank order."""
    gathered = _copies([tensors[0] for tensors in inputs])
    return [gathered if member == root else () for member in range(len(inputs))]


def scatter(inputs: Inputs, root: int) -> list[Tensors]:
    """Member ``m`` receives the ``m``-th tensor of ``root``."""
    return [[tensor] for tensor in _copies(inputs[root])]


def reduce_scatter(inputs: Inputs, reduction: Reduction) -> list[Tensors]:
    """Member ``m`` receives the reduction of everybody's ``m``-th tensor."""
    return [[reduction(column)] for column in zip(*inputs, strict=True)]


def reduce_scatter_single(inputs: Inputs, reduction: Reduction) -> list[Tensors]:
    """Member ``m`` receives the ``m``-th equal part of the reduction, position by position."""
    size = len(inputs)
    parts = [reduction(column).reshape(-1).tensor_split(size) for column in zip(*inputs, strict=True)]
    return list(zip(*parts, strict=True))


def all_to_all(inputs: Inputs) -> list[Tensors]:
    """Member ``m`` receives everybody's ``m``-th tensor, in rank order."""
    return list(zip(*map(_copies, inputs), strict=True))


def all_to_all_single(inputs: Inputs, splits: Sequence[Sequence[int]]) -> list[Tensors]:
    """Member ``m`` receives everybody's ``m``-th part, end to end.

    ``splits`` holds, for each member, the sizes along dimension 0 of the parts it sends to members 0, 1, and so on.
    """
    parts = [tensors[0].detach().split(list(sizes)) for tensors, sizes in zip(inputs, splits, strict=True)]
    return [[torch.cat([part.reshape(-1) for part in column])] for column in zip(*parts, strict=True)]
