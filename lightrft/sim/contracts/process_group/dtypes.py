"""PG801 and on: every dtype through the collectives, with numbers that it holds exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import (
    Subject,
    all_gather_single,
    last_rank,
    reduce_scatter_single,
)


def _numbers(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """``size`` small whole numbers that every dtype can hold, others for every rank."""
    found = (torch.arange(size, device="cpu") * 3 + rank * 2) % 4
    return torch.complex(found.double(), found.double() + rank).to(dtype) if dtype.is_complex else found.to(dtype)


_ORDERED = ("SUM", "MIN", "MAX")
_COMPUTED: dict[str, Callable[[Tensor, int], Tensor]] = {"SUM": torch.sum, "MIN": torch.amin, "MAX": torch.amax}


def _shown(tensor: Tensor) -> list[int]:
    """The bytes of a tensor; of booleans their values, since gloo writes other bytes than 1 for True."""
    whole = tensor.cpu().contiguous().reshape(-1)
    return (whole.int() if whole.dtype == torch.bool else whole.view(torch.uint8)).tolist()


def _moved(dtype: torch.dtype, device: str) -> list[list[int]]:
    """What this rank receives in collectives and a message."""
    rank, size = dist.get_rank(), dist.get_world_size()
    tensor, shared = (_numbers(rank, size, dtype).to(device) for _ in range(2))
    outputs = [torch.zeros_like(tensor) for _ in range(size)]
    single, exchanged, received = torch.cat(outputs), torch.zeros_like(tensor), torch.zeros_like(tensor)
    dist.broadcast(shared, last_rank())
    dist.all_gather(outputs, tensor)
    all_gather_single(single, tensor)
    dist.all_to_all_single(exchanged, tensor)
    if size == 1:  # nobody to send to
        return [_shown(found) for found in (shared, torch.cat(outputs), single, exchanged, tensor)]
    operations = [
        dist.P2POp(dist.isend, tensor, (rank + 1) % size),
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return [_shown(found) for found in (shared, torch.cat(outputs), single, exchanged, received)]


def _right_moved(rank: int, size: int, dtype: torch.dtype) -> list[list[int]]:
    rows = [_numbers(owner, size, dtype) for owner in range(size)]
    column = torch.stack([row[rank] for row in rows])
    return [_shown(found) for found in (rows[-1], torch.cat(rows), torch.cat(rows), column, rows[rank - 1])]


def _reduced(dtype: torch.dtype, device: str, ops: Sequence[str], scatters: bool) -> list[list[int]]:
    """What this rank receives in reductions."""
    rank, size, found = dist.get_rank(), dist.get_world_size(), []
    for op in ops:
        tensor, part = _numbers(rank, size, dtype).to(device), torch.zeros(1, dtype=dtype, device=device)
        if scatters:
            reduce_scatter_single(part, tensor, getattr(dist.ReduceOp, op))
            found.append(_shown(part))
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
        found.append(_shown(tensor))
    return found


def _right_reduced(rank: int, size: int, dtype: torch.dtype, ops: Sequence[str], scatters: bool) -> list[list[int]]:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    rows, found = torch.stack([_numbers(owner, size, dtype).to(wide) for owner in range(size)]), []
    for op in ops:
        whole = _COMPUTED[op](rows, 0).to(dtype)
        if scatters:
            found.append(_shown(whole[rank : rank + 1]))
        found.append(_shown(whole))
    return found


def _travels(
    subject: Subject, dtype: torch.dtype, ops: Sequence[str], *, moves: bool = True, scatters: bool = True
) -> None:
    """``dtype`` is moved, and reduced with ``ops``."""
    device = subject.device

    def body() -> object:
        return _moved(dtype, device) if moves else None, _reduced(dtype, device, ops, scatters)

    def expected(rank: int, size: int) -> object:
        return _right_moved(rank, size, dtype) if moves else None, _right_reduced(rank, size, dtype, ops, scatters)

    subject.expect(body, expected)


@contract.check(801)
def check_float64(subject: Subject) -> None:
    """float64 is moved and reduced."""
    _travels(subject, torch.float64, _ORDERED)


@contract.check(802)
def check_float32(subject: Subject) -> None:
    """float32 is moved and reduced."""
    _travels(subject, torch.float32, _ORDERED)


@contract.check(803)
def check_float16(subject: Subject) -> None:
    """float16 is moved and reduced."""
    _travels(subject, torch.float16, _ORDERED)


@contract.check(804)
def check_bfloat16(subject: Subject) -> None:
    """bfloat16 is moved and reduced."""
    _travels(subject, torch.bfloat16, _ORDERED)


@contract.check(805)
def check_int64(subject: Subject) -> None:
    """int64 is moved and reduced."""
    _travels(subject, torch.int64, _ORDERED)


@contract.check(806)
def check_int32(subject: Subject) -> None:
    """int32 is moved and reduced."""
    _travels(subject, torch.int32, _ORDERED)


@contract.check(807)
def check_int8(subject: Subject) -> None:
    """int8 is moved and reduced."""
    _travels(subject, torch.int8, _ORDERED)


@contract.check(808)
def check_uint8(subject: Subject) -> None:
    """uint8 is moved and reduced."""
    _travels(subject, torch.uint8, _ORDERED)


@contract.check(809)
def check_bool(subject: Subject) -> None:
    """Bool is moved and reduced: SUM and MAX are or, MIN is and."""
    _travels(subject, torch.bool, _ORDERED)


@contract.check(810)
def check_complex64(subject: Subject) -> None:
    """complex64 is moved, and added by `all_reduce`."""
    _travels(subject, torch.complex64, ("SUM",), scatters=False)


@contract.check(811)
def check_complex128(subject: Subject) -> None:
    """complex128 is moved, and added by `all_reduce`."""
    _travels(subject, torch.complex128, ("SUM",), scatters=False)


@contract.check(812, "complex_reduce_scatter")
def check_complex_reduce_scatter(subject: Subject) -> None:
    """complex64 is added by `reduce_scatter_tensor`."""
    _travels(subject, torch.complex64, ("SUM",), moves=False)


@contract.check(813, "float8")
def check_float8_e4m3fn(subject: Subject) -> None:
    """float8_e4m3fn is moved."""
    _travels(subject, torch.float8_e4m3fn, ())


@contract.check(814, "float8")
def check_float8_e5m2(subject: Subject) -> None:
    """float8_e5m2 is moved."""
    _travels(subject, torch.float8_e5m2, ())


@contract.check(815, "float8_reductions")
def check_float8_e4m3fn_reductions(subject: Subject) -> None:
    """float8_e4m3fn is reduced."""
    _travels(subject, torch.float8_e4m3fn, _ORDERED, moves=False)


@contract.check(816, "float8_reductions")
def check_float8_e5m2_reductions(subject: Subject) -> None:
    """float8_e5m2 is reduced."""
    _travels(subject, torch.float8_e5m2, _ORDERED, moves=False)
