"""Refusals: what a group does not take, judged by the rules of a :class:`~lightrft.sim.profiles.Profile`.

Everything here is one rank's own mistake, found before the call meets those of other ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.errors import RefusedError
from lightrft.sim.profiles import COMMON_DTYPES, Profile

__all__ = ["Acceptance", "Reduction", "advice", "elsewhere"]

_REDUCTIONS: dict[Any, str] = {
    getattr(dist.ReduceOp, name): name
    for name in ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR", "PREMUL_SUM")
}
_INTEGERS_ONLY = frozenset({"BAND", "BOR", "BXOR"})
_COMPLEX_TOO = frozenset({"SUM", "AVG", "PREMUL_SUM"})
_LAYOUT_KEPT = frozenset({"all_reduce", "broadcast", "reduce"})


class Reduction(NamedTuple):
    """A reduce operation: its name, how a report shows it, and the factor of PREMUL_SUM."""

    name: str
    label: str
    factor: float = 1.0


class Acceptance:
    """The checks of one group's calls.

    Args:
        meet_elsewhere: a method of the group, called with the operation and a tensor that is not in the memory of the
            CPU, which nobody can communicate; raises once it is known who else has one. It is held weakly: group and
            checks would keep each other alive.
    """

    __slots__ = ("_backend", "_meet_elsewhere", "profile", "size")

    def __init__(
        self, profile: Profile, backend: str, size: int, meet_elsewhere: Callable[[str, Tensor], NoReturn]
    ) -> None:
        self.profile = profile
        self.size = size
        self._meet_elsewhere = WeakMethod(meet_elsewhere)
        self._backend = backend if profile.name == "strict" else profile.name

    def tensors(self, operation: str, tensors: Sequence[Tensor]) -> None:
        """Layout, device and dtype."""
        for tensor in tensors:
            if tensor.dtype not in COMMON_DTYPES or not tensor.is_contiguous() or not tensor.is_cpu:
                self._doubtful(operation, tensor)

    def parts_of_list(self, operation: str, tensors: Sequence[Tensor], whole: Tensor) -> Any:
        """As :meth:`tensors`, for a list with one entry per member, all of the dtype of ``whole``.

        Returns:
            the shape of all, or, where they may differ, a tuple of shapes. It is a pass over a list that grows with the
            group, on every member, and so does all in one go.
        """
        dtype, shape, even = whole.dtype, tensors[0].shape, True
        for tensor in tensors:
            if tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
                if tensor.dtype is not dtype:
                    _refuse(f"{operation}: {tensor.dtype} in a list that goes with {dtype}")
                self._doubtful(operation, tensor)
            if tensor.shape != shape:
                even = False
        if even:
            return shape if self.profile.same_shape else (shape.numel(),)
        if operation not in self.profile.uneven:
            _refuse(f"{operation}: tensors of different sizes are not supported by {self._backend}")
        return tuple(t.shape if self.profile.same_shape else (t.numel(),) for t in tensors)

    def messages(self, operation: str, tensors: Sequence[Tensor]) -> str | None:
        """As :meth:`tensors`, for send and recv.

        Returns:
            the device of a tensor that is not in the memory of the CPU: it is refused when the message has met its
            counterpart.
        """
        device = None
        for tensor in tensors:
            if not tensor.is_contiguous():
                self._not_contiguous(operation, tensor)
            if not tensor.is_cpu:
                device = str(tensor.device)
            accepted = self.profile.message_dtypes
            if accepted is not None and tensor.dtype not in accepted:
                _refuse(f"{operation}: {tensor.dtype} is not supported by {self._backend}")
        return device

    def _doubtful(self, operation: str, tensor: Tensor) -> None:
        profile = self.profile
        if not tensor.is_cpu:
            meet = self._meet_elsewhere()
            assert meet is not None, "the group makes the call"
            meet(operation, tensor)
        if not tensor.is_contiguous() and operation not in profile.strided:
            self._not_contiguous(operation, tensor)
        if tensor.dtype not in profile.dtypes_of.get(operation, profile.dtypes):
            _refuse(f"{operation}: {tensor.dtype} is not supported by {self._backend}")

    def _not_contiguous(self, operation: str, tensor: Tensor) -> None:
        _refuse(
            f"{operation}: the tensor of shape {list(tensor.shape)} is not contiguous; nccl refuses it and gloo "
            "gives wrong values: call .contiguous() first"
        )

    def in_memory_order(self, operation: str, tensor: Tensor) -> Tensor:
        """A contiguous view of a tensor that is dense in another order of dimensions (``channels_last``).

        The layout is then part of the shape, so that ranks with different layouts disagree.
        """
        if tensor.is_contiguous() or operation not in _LAYOUT_KEPT:
            return tensor
        for layout, order in ((torch.channels_last, (0, 2, 3, 1)), (torch.channels_last_3d, (0, 2, 3, 4, 1))):
            if tensor.dim() == len(order) and tensor.is_contiguous(memory_format=layout):
                return tensor.detach().permute(order)
        return tensor

    def outputs(self, operation: str, outputs: Iterable[Tensor]) -> None:
        """Outputs that autograd keeps a backend from writing to. Call it only while autograd records."""
        for tensor in outputs:
            if tensor.requires_grad and (tensor.is_leaf or operation == "all_gather_single"):
                _refuse(
                    f"{operation}: an output of shape {list(tensor.shape)} requires grad; gloo refuses to write to it: "
                    "call it under torch.no_grad(), or give it .data"
                )

    def dense(self, operation: str, tensor: Tensor) -> None:
        """An output that no backend copies into, of an operation that copies its inputs."""
        if not tensor.is_contiguous():
            self._not_contiguous(operation, tensor)

    def any_source(self, tensors: Sequence[Tensor]) -> None:
        """A receive from whoever sends first."""
        self.feature("any_source", "recv without a source")
        if not all(tensor.numel() for tensor in tensors):
            _refuse("recv: a tensor of no elements from any source is refused by gloo: name the source")

    def gathered_input(self, operation: str, tensor: Tensor) -> None:
        """The input of ``all_gather_single``."""
        if not self.profile.raw_input and tensor.requires_grad and torch.is_grad_enabled():
            _refuse(f"{operation}: the input requires grad; gloo refuses it: call .detach() first")

    def reduction(self, reduce_op: Any, tensors: Sequence[Tensor], operation: str) -> Reduction:
        """The reduce operation that the caller asked for."""
        name = _REDUCTIONS.get(getattr(reduce_op, "op", reduce_op))
        if name is None:
            _refuse(f"{operation}: {reduce_op!r} is no reduce operation")
        if name not in self.profile.reductions:
            _refuse(f"{operation}: ReduceOp.{name} is not supported by {self._backend}")
        if name == "SUM":
            return _SUM
        for dtype in {tensor.dtype for tensor in tensors}:
            self._reduces(operation, name, dtype)
        if name != "PREMUL_SUM":
            return Reduction(name, name)
        factor = float(reduce_op.__getstate__()[1])
        return Reduction(name, f"{name}({factor:g})", factor)

    def _reduces(self, operation: str, name: str, dtype: torch.dtype) -> None:
        integer = not (dtype.is_floating_point or dtype.is_complex)
        if name in _INTEGERS_ONLY and not integer:
            _refuse(f"{operation}: ReduceOp.{name} needs integers, not {dtype}")
        if dtype.is_complex and name not in _COMPLEX_TOO:
            _refuse(f"{operation}: ReduceOp.{name} has no meaning for {dtype}")
        if name == "AVG" and integer and (dtype == torch.bool or not self.profile.integer_average):
            _refuse(
                f"{operation}: ReduceOp.AVG needs floating point, not {dtype}, which gloo refuses: use SUM and divide"
            )
        if name == "PREMUL_SUM" and (integer or dtype.itemsize == 1):
            _refuse(f"{operation}: ReduceOp.PREMUL_SUM needs floating point of 16 bits or more, not {dtype}")

    def count(self, operation: str, what: str, got: int) -> None:
        """A list must have one entry per member."""
        if got != self.size:
            _refuse(f"{operation}: {what} must have {self.size} entries (the size of the group), got {got}")

    def root(self, operation: str, root: int) -> None:
        """The root must be a member."""
        if not 0 <= root < self.size:
            _refuse(f"{operation}: root {root} is no member of the group, whose size is {self.size}")

    def same(self, operation: str, what: str, tensor: Tensor, other: Tensor) -> None:
        """Dtype and shape of an output and of what it will hold; where layout is free, the number of elements."""
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            agree = tensor.numel() == other.numel() and tensor.dtype == other.dtype
            if not (agree and self.profile.any_layout):
                _refuse(f"{operation}: {what} is {_shown(tensor)}, expected {_shown(other)}")

    def exactly(self, operation: str, what: str, tensor: Tensor, other: Tensor) -> None:
        """As :meth:`same`, where no backend is free in layout."""
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            _refuse(f"{operation}: {what} is {_shown(tensor)}, expected {_shown(other)}")

    def one_dtype(self, operation: str, tensor: Tensor, others: Sequence[Tensor]) -> None:
        """All tensors of a list must have the dtype of ``tensor``."""
        for dtype in {other.dtype for other in others}:
            if dtype != tensor.dtype:
                _refuse(f"{operation}: {dtype} in a list that goes with {tensor.dtype}")

    def lengths(self, operation: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Every input needs an output."""
        if len(outputs) != len(inputs):
            _refuse(f"{operation}: {len(outputs)} outputs for {len(inputs)} inputs")

    def pairs(self, operation: str, what: str, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Every output must be like the input at its position."""
        self.lengths(operation, outputs, inputs)
        for position, (output, tensor) in enumerate(zip(outputs, inputs, strict=True)):
            self.exactly(operation, f"{what} {position}", output, tensor)

    def rows(self, operation: str, output: Tensor, tensor: Tensor) -> None:
        """What is split along dimension 0 must agree in dtype and in all other dimensions."""
        if output.dtype != tensor.dtype or output.shape[1:] != tensor.shape[1:]:
            _refuse(
                f"{operation}: the output is {_shown(output)} and the input {_shown(tensor)}: they must agree in dtype "
                "and in all dimensions but the first"
            )

    def parts(self, operation: str, whole: Tensor, part: Tensor, name: str) -> None:
        """``whole`` must be the parts of all members, each like ``part``, end to end along dimension 0."""
        if whole.dtype == part.dtype:
            if part.dim() and whole.shape == (part.shape[0] * self.size, *part.shape[1:]):
                return
            if self.profile.any_layout and whole.numel() == part.numel() * self.size:
                return
        if not part.dim():
            expected = f"{part.dtype}[{self.size}], and parts of one dimension: reshape the scalar to [1]"
        else:
            expected = f"{part.dtype}{[part.shape[0] * self.size, *part.shape[1:]]}"
        _refuse(
            f"{operation}: the {name} is {_shown(whole)}, expected {expected}: the parts of {self.size} members end to "
            "end along dimension 0 (gloo refuses any other shape)"
        )

    def even(self, operation: str, tensors: Sequence[Tensor]) -> None:
        """All shapes agree, where the backend cannot do otherwise."""
        shape = tensors[0].shape
        if operation not in self.profile.uneven and any(tensor.shape != shape for tensor in tensors):
            _refuse(f"{operation}: tensors of different sizes are not supported by {self._backend}")

    def feature(self, name: str, what: str) -> None:
        """Something that only one backend has."""
        if name not in self.profile.only_here:
            _refuse(f"{what} is not supported by {self._backend}")

    def splits(self, what: str, tensor: Tensor, splits: Sequence[int]) -> list[int]:
        """Sizes along dimension 0 of what goes to, or comes from, each member."""
        operation = "all_to_all_single"
        if not tensor.dim():
            _refuse(f"{operation}: the {what} is a scalar; it must have a dimension to split")
        length = tensor.shape[0]
        if not splits:
            if length % self.size:
                _refuse(
                    f"{operation}: dimension 0 of the {what} ({length}) is not divisible by the group size "
                    f"{self.size}; gloo reads beyond its end"
                )
            return [length // self.size] * self.size
        self.count(operation, f"{what}_split_sizes", len(splits))
        if sum(splits) != length or min(splits) < 0:
            _refuse(
                f"{operation}: {what}_split_sizes {list(splits)} add up to {sum(splits)}, dimension 0 of the {what} is "
                f"{length}"
            )
        return list(splits)


def elsewhere(operation: str, device: str) -> RefusedError:
    """What is said of a tensor that is not in the memory of the CPU, where simulated ranks keep all of theirs."""
    return RefusedError(f"{operation}: a tensor on {device}, {advice(device)}")


def advice(device: str) -> str:
    """What is wrong with a tensor on ``device``, and what to do."""
    if device != "meta":
        return "but simulated ranks keep all tensors on the CPU: make it inside the function of the run"
    return (
        "which has no data: torch skips the call without a word, while other ranks wait for it. Give the model memory "
        "first (to_empty, then load or initialise the weights)"
    )


def _refuse(message: str) -> NoReturn:
    raise RefusedError(message)


_SUM = Reduction("SUM", "SUM")


def _shown(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)}"
