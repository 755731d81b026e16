"""Writing to the tensors of a rank as a backend's C++ code does: below autograd and below every dispatch mode.

The thread that completes a collective belongs to one of the ranks. What that rank has switched on (grad or inference
mode, a ``TorchDispatchMode`` that counts operations) must neither see nor change what is done for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "BelowAutograd",
    "below_modes",
    "copy_results",
    "is_poisoned",
    "plain",
    "poison",
    "same_bits",
    "span",
    "write_results",
]

BelowAutograd = torch._C._InferenceMode
"""``with BelowAutograd(True)``: writing works on every tensor (parameters, inference tensors), and leaves no trace."""

_Result = TypeVar("_Result")
_PLAIN = (Tensor, torch.nn.Parameter)


def plain(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """``tensors``, with what stands for the result of a functional collective replaced by that result.

    Waiting for it is up to the rank that owns it; whoever completes the next collective could not.
    """
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return [tensor.trigger_wait() if hasattr(tensor, "trigger_wait") else tensor for tensor in tensors]
    return tensors


def below_modes(function: Callable[..., _Result], *args: object) -> _Result:
    """Call ``function`` with the calling thread's dispatch modes switched off."""
    if not torch._C._len_torch_dispatch_stack():
        return function(*args)
    with _disable_current_modes():
        return function(*args)


def poison(tensors: Sequence[Tensor]) -> None:
    """Overwrite ``tensors`` with values that nobody mistakes for a result."""
    with BelowAutograd(True):
        for tensor in tensors:
            if tensor.numel():
                _fill(tensor.data)


def _fill(target: Tensor) -> None:
    dtype = target.dtype
    if dtype.is_floating_point and dtype.itemsize == 1:
        target.view(torch.uint8).fill_(0x7F)
    elif dtype.is_floating_point or dtype.is_complex:
        target.fill_(float("nan"))
    elif dtype == torch.bool:
        target.fill_(True)
    else:
        info = torch.iinfo(dtype)
        target.fill_(info.min if info.min < 0 else info.max)


def is_poisoned(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds what :func:`poison` wrote, and nothing else."""
    expected = torch.empty_like(tensor)
    if expected.numel():
        _fill(expected)
    return same_bits(tensor, expected)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equality bit by bit: a NaN equals itself."""
    return torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    if flat.stride(0) != 1:
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def span(tensor: Tensor) -> tuple[int, int]:
    """The addresses of the first byte that ``tensor`` uses and of the first behind it; equal for an empty one."""
    start = tensor.data_ptr()
    if not tensor.numel():
        return start, start
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def write_results(results: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Write as raw memory: autograd sees nothing, and version counters stay."""
    with BelowAutograd(True):
        _copy([output.data for output in outputs] if results else (), results)


def copy_results(results: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Write as gloo does where it goes through a buffer of its own: version counters advance."""
    with torch.no_grad():
        _copy(outputs if results else (), results)


def _copy(outputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """Copy tensors of equal numbers of elements; in most calls their shapes agree too."""
    if len(outputs) == 1:
        output, result = outputs[0], results[0]
        output.copy_(result if result.shape == output.shape else result.view(output.shape))
    elif outputs:
        try:
            torch._foreach_copy_(list(outputs), list(results))
        except RuntimeError:
            pairs = zip(results, outputs, strict=True)
            torch._foreach_copy_(list(outputs), [result.view(output.shape) for result, output in pairs])
