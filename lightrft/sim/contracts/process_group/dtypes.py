"""PG801 and on: every dtype through the collectives, with numbers that it holds exactly."""

from __future__ import annotations

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


def _shown(tensor: Tensor) -> list[int]:
    """The bytes of a tensor."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).tolist()


def _moves(subject: Subject, dtype: torch.dtype) -> None:
    device = subject.device

    def body() -> object:
        rank, size = dist.get_rank(), dist.get_world_size()
        tensor, shared = (_numbers(rank, size, dtype).to(device) for _ in range(2))
        outputs = [torch.zeros_like(tensor) for _ in range(size)]
        single, exchanged, received = torch.cat(outputs), torch.zeros_like(tensor), torch.zeros_like(tensor)
        dist.broadcast(shared, last_rank())
        dist.all_gather(outputs, tensor)
        all_gather_single(single, tensor)
        dist.all_to_all_single(exchanged, tensor)
        if size > 1:
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, tensor, (rank + 1) % size),
                    dist.P2POp(dist.irecv, received, (rank - 1) % size),
                ]
            )
            for work in works:
                work.wait()
        else:
            received = tensor
        return [_shown(found) for found in (shared, torch.cat(outputs), single, exchanged, received)]

    def expected(rank: int, size: int) -> object:
        rows = [_numbers(owner, size, dtype) for owner in range(size)]
        column = torch.stack([row[rank] for row in rows])
        return [_shown(found) for found in (rows[-1], torch.cat(rows), torch.cat(rows), column, rows[rank - 1])]

    subject.expect(body, expected)


def _reduces(subject: Subject, dtype: torch.dtype, ops: tuple[str, ...], scatters: bool = True) -> None:
    device = subject.device

    def body() -> object:
        rank, size, found = dist.get_rank(), dist.get_world_size(), []
        for op in ops:
            tensor, part = _numbers(rank, size, dtype).to(device), torch.zeros(1, dtype=dtype, device=device)
            if scatters:
                reduce_scatter_single(part, tensor, getattr(dist.ReduceOp, op))
            dist.all_reduce(tensor, getattr(dist.ReduceOp, op))
            found.append((_shown(tensor), _shown(part) if scatters else None))
        return found

    def expected(rank: int, size: int) -> object:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        rows = torch.stack([_numbers(owner, size, dtype).to(wide) for owner in range(size)])
        found = []
        for op in ops:
            whole = {"SUM": lambda: rows.sum(0), "MIN": lambda: rows.amin(0), "MAX": lambda: rows.amax(0)}[op]()
            whole = whole.to(dtype)
            found.append((_shown(whole), _shown(whole[rank : rank + 1]) if scatters else None))
        return found

    subject.expect(body, expected)


@contract.check(801)
def check_float64(subject: Subject) -> None:
    """float64 is moved and reduced."""
    _moves(subject, torch.float64)
    _reduces(subject, torch.float64, ("SUM", "MIN", "MAX"))


@contract.check(802)
def check_float32(subject: Subject) -> None:
    """float32 is moved and reduced."""
    _moves(subject, torch.float32)
    _reduces(subject, torch.float32, ("SUM", "MIN", "MAX"))


@contract.check(803)
def check_float16(subject: Subject) -> None:
    """float16 is moved and reduced."""
    _moves(subject, torch.float16)
    _reduces(subject, torch.float16, ("SUM", "MIN", "MAX"))


@contract.check(804)
def check_bfloat16(subject: Subject) -> None:
    """bfloat16 is moved and reduced."""
    _moves(subject, torch.bfloat16)
    _reduces(subject, torch.bfloat16, ("SUM", "MIN", "MAX"))


@contract.check(805)
def check_int64(subject: Subject) -> None:
    """int64 is moved and reduced."""
    _moves(subject, torch.int64)
    _reduces(subject, torch.int64, ("SUM", "MIN", "MAX"))


@contract.check(806)
def check_int32(subject: Subject) -> None:
    """int32 is moved and reduced."""
    _moves(subject, torch.int32)
    _reduces(subject, torch.int32, ("SUM", "MIN", "MAX"))


@contract.check(807)
def check_int8(subject: Subject) -> None:
    """int8 is moved and reduced."""
    _moves(subject, torch.int8)
    _reduces(subject, torch.int8, ("SUM", "MIN", "MAX"))


@contract.check(808)
def check_uint8(subject: Subject) -> None:
    """uint8 is moved and reduced."""
    _moves(subject, torch.uint8)
    _reduces(subject, torch.uint8, ("SUM", "MIN", "MAX"))


@contract.check(809)
def check_bool(subject: Subject) -> None:
    """Bool is moved and reduced: SUM and MAX are or, MIN is and."""
    _moves(subject, torch.bool)
    _reduces(subject, torch.bool, ("SUM", "MIN", "MAX"))


@contract.check(810)
def check_complex64(subject: Subject) -> None:
    """complex64 is moved, and added by `all_reduce`."""
    _moves(subject, torch.complex64)
    _reduces(subject, torch.complex64, ("SUM",), scatters=False)


@contract.check(811)
def check_complex128(subject: Subject) -> None:
    """complex128 is moved, and added by `all_reduce`."""
    _moves(subject, torch.complex128)
    _reduces(subject, torch.complex128, ("SUM",), scatters=False)


@contract.check(812, "complex_reduce_scatter")
def check_complex_reduce_scatter(subject: Subject) -> None:
    """complex64 is added by `reduce_scatter_tensor`."""
    _reduces(subject, torch.complex64, ("SUM",))


@contract.check(813, "float8")
def check_float8_e4m3fn(subject: Subject) -> None:
    """float8_e4m3fn is moved."""
    _moves(subject, torch.float8_e4m3fn)


@contract.check(814, "float8")
def check_float8_e5m2(subject: Subject) -> None:
    """float8_e5m2 is moved."""
    _moves(subject, torch.float8_e5m2)


@contract.check(815, "float8_reductions")
def check_float8_e4m3fn_reductions(subject: Subject) -> None:
    """float8_e4m3fn is reduced."""
    _reduces(subject, torch.float8_e4m3fn, ("SUM", "MIN", "MAX"))


@contract.check(816, "float8_reductions")
def check_float8_e5m2_reductions(subject: Subject) -> None:
    """float8_e5m2 is reduced."""
    _reduces(subject, torch.float8_e5m2, ("SUM", "MIN", "MAX"))
