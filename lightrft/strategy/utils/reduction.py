"""How values are reduced over ranks: in as few collectives as there are dtypes, or fewer.

The first collective is a *packet* of fixed size, the same whatever a rank holds. It carries a fingerprint of the keys,
types and shapes, so that ranks that disagree find out before they meet in a collective that does not fit, and besides
as many values as there is room for, as float64. A dict of some dozen metrics is reduced by the packet alone. What is
too large for it, or not exact in float64, follows in one collective per dtype.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.strategy.utils.leaves import Layout, Leaf, check_values, disagreement, fingerprint, refusal, tensor_kind

__all__ = ["Reduction", "is_integer"]

_CHUNK = 18
"""Bits of the fingerprint in one slot: the sum of squares over 2**17 ranks is exact in float64."""
_CHUNKS = 3
_HEADER = 2 * _CHUNKS + 1
_ROOM = 128
"""Slots for values in a packet; it is 1080 bytes, so its time is that of an empty one."""
_EXACT = 1 << 53
"""Integers up to here are exact in float64."""


def _refusal(leaf: Leaf, op: str) -> str:
    if isinstance(leaf.value, Tensor) and leaf.value.is_complex() and op in ("max", "min"):
        return f"complex: op={op!r} has no meaning, expected mean or sum"
    if isinstance(leaf.value, Tensor) and leaf.value.dtype == torch.uint64:
        return "a tensor of uint64, which is not reduced: give one of int64"
    return refusal(leaf.value)


def _kind(leaf: Leaf, op: str) -> str:
    """What has to agree. A mean makes floats of all numbers, so that 0 on one rank and 0.5 on another is no fault."""
    if isinstance(leaf.value, Tensor):
        return tensor_kind(leaf.value, leaf.value.shape)
    return "a Python number" if op == "mean" else f"a Python {type(leaf.value).__name__}"


def is_integer(leaf: Leaf, op: str) -> bool:
    """Whether a value is reduced as an integer, exactly. A mean makes floats of Python numbers from the start."""
    if isinstance(leaf.value, Tensor):
        return not (leaf.value.is_floating_point() or leaf.value.is_complex())
    return op != "mean" and not isinstance(leaf.value, float)


def _travels_as(leaf: Leaf, op: str) -> torch.dtype:
    """The dtype in which a value is reduced, where it does not fit into the packet."""
    if is_integer(leaf, op):
        return torch.int64
    if not isinstance(leaf.value, Tensor):
        return torch.float64
    dtype = leaf.value.dtype
    return dtype if dtype == torch.float64 or dtype.is_complex else torch.float32


class Reduction:
    """One call of ``all_reduce`` on one rank.

    Args:
        leaves: the values, in the order in which all ranks have them.
        op: ``mean``, ``max``, ``min`` or ``sum``; of a mean this computes the sum.
        world: number of ranks in ``group``; with 1 there is no collective.
        group: who takes part.
        device: where tensors travel.
    """

    def __init__(
        self, leaves: list[Leaf], op: str, world: int, group: dist.ProcessGroup | None, device: torch.device
    ) -> None:
        self._leaves = leaves
        self._op = op
        self._adds = op in ("mean", "sum")
        self._world = world
        self._group = group
        self._device = device
        self._refusals = {leaf.name: why for leaf in leaves if (why := _refusal(leaf, op))}
        self._results: dict[tuple[Any, ...], Tensor] = {}

    def run(self) -> dict[tuple[Any, ...], Tensor]:
        """The reduced value of each leaf, flat; sums for a mean."""
        late = self._leaves
        if self._world == 1:
            check_values(self._refusals)
        else:
            riders = self._riders()
            inexact = self._send_packet(riders)
            riding = {leaf.path for leaf in riders if not (inexact and is_integer(leaf, self._op))}
            late = [leaf for leaf in self._leaves if leaf.path not in riding]
        for dtype in dict.fromkeys(_travels_as(leaf, self._op) for leaf in late):
            self._send([leaf for leaf in late if _travels_as(leaf, self._op) == dtype], dtype)
        return self._results

    def _riders(self) -> list[Leaf]:
        """The values that go into the packet, chosen by the layout alone so that all ranks choose alike."""
        riders: list[Leaf] = []
        room = 0 if self._refusals else _ROOM if self._adds else _ROOM // 2
        for leaf in self._leaves:
            if leaf.size <= room and not (isinstance(leaf.value, Tensor) and leaf.value.is_complex()):
                riders.append(leaf)
                room -= leaf.size
        return riders

    def _send_packet(self, riders: list[Leaf]) -> bool:
        """Agree, and reduce ``riders``; whether integers among them are too large for float64, on some rank."""
        kinds = {leaf.name: _kind(leaf, self._op) for leaf in self._leaves}
        layout: Layout = {"the operation": self._op} | kinds | self._refusals
        print_ = fingerprint(layout, _CHUNK * _CHUNKS)
        chunks = [print_ >> (_CHUNK * i) & ((1 << _CHUNK) - 1) for i in range(_CHUNKS)]
        checks = [chunk * chunk if self._adds else -chunk for chunk in chunks]
        header = [*chunks, *checks, self._holds_inexact(riders)]
        values = self._reducible(self._packed(riders, torch.float64))
        packet = torch.zeros(_HEADER + _ROOM, dtype=torch.float64, device=self._device)
        packet[:_HEADER] = torch.tensor(header, dtype=torch.float64)
        packet[_HEADER : _HEADER + len(values)] = values
        dist.all_reduce(packet, self._reduce_op(), group=self._group)
        head = [int(slot) for slot in packet[:_HEADER].tolist()]
        if not self._equal_everywhere(head[:_CHUNKS], head[_CHUNKS : 2 * _CHUNKS]):
            raise disagreement("all_reduce", layout, self._group)
        check_values(self._refusals)
        self._unpack(riders, self._reduced(packet[_HEADER : _HEADER + len(values)]))
        return head[-1] > 0

    def _equal_everywhere(self, chunks: list[int], checks: list[int]) -> bool:
        """Whether all ranks gave the same numbers: their variance is zero, or their maximum is their minimum."""
        if self._adds:
            return all(self._world * squares == total**2 for total, squares in zip(chunks, checks, strict=True))
        return all(largest == -smallest for largest, smallest in zip(chunks, checks, strict=True))

    def _holds_inexact(self, riders: list[Leaf]) -> bool:
        limit = _EXACT // self._world if self._adds else _EXACT
        wide = [leaf.value for leaf in riders if is_integer(leaf, self._op)]
        numbers = (v for v in wide if not isinstance(v, Tensor))
        tensors = (v for v in wide if isinstance(v, Tensor) and v.dtype.itemsize == 8 and v.numel())
        return any(abs(v) > limit for v in numbers) or any(bool(((v > limit) | (v < -limit)).any()) for v in tensors)

    def _send(self, leaves: list[Leaf], dtype: torch.dtype) -> None:
        """Reduce ``leaves`` in one collective."""
        flat = self._packed(leaves, dtype)
        if self._world > 1:
            flat = self._reducible(flat)
            dist.all_reduce(flat, self._reduce_op(dtype), group=self._group)
            flat = self._reduced(flat)
        self._unpack(leaves, flat)

    def _packed(self, leaves: list[Leaf], dtype: torch.dtype) -> Tensor:
        parts = [
            leaf.value.reshape(-1).to(self._device, dtype)
            if isinstance(leaf.value, Tensor)
            else torch.tensor([leaf.value], dtype=dtype, device=self._device)
            for leaf in leaves
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=dtype, device=self._device)

    def _unpack(self, leaves: list[Leaf], flat: Tensor) -> None:
        for leaf, part in zip(leaves, flat.split([leaf.size for leaf in leaves]), strict=True):
            self._results[leaf.path] = part.to(torch.int64) if is_integer(leaf, self._op) else part

    # Backends disagree about NaN in a maximum (gloo may drop it), so it travels beside the values, as 1 for NaN. And
    # a minimum travels as the maximum of the negated values, so that one operation reduces values and marks. Integers
    # have no NaN, and their smallest cannot be negated: they use MIN.

    def _reduce_op(self, dtype: torch.dtype = torch.float64) -> dist.ReduceOp.RedOpType:
        if self._adds:
            return dist.ReduceOp.SUM
        return dist.ReduceOp.MIN if self._op == "min" and not dtype.is_floating_point else dist.ReduceOp.MAX

    def _reducible(self, flat: Tensor) -> Tensor:
        if self._adds or not flat.is_floating_point():
            return flat
        signed = -flat if self._op == "min" else flat
        marks = signed.isnan()
        return torch.cat([signed.masked_fill(marks, -torch.inf), marks.to(flat.dtype)])

    def _reduced(self, flat: Tensor) -> Tensor:
        if self._adds or not flat.is_floating_point():
            return flat
        signed, marks = flat.chunk(2) if flat.numel() else (flat, flat)
        return (-signed if self._op == "min" else signed).masked_fill(marks > 0, torch.nan)
