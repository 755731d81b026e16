"""The collectives that are compared, through the ordinary calls of ``torch.distributed``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist

from benchmarks.groups import Body, now

SMALL = 16
BIG = 1 << 20

Calls = Sequence[Callable[[], object]]


def make_all_reduce(ranks: int, size: int = SMALL) -> Calls:
    return [functools.partial(dist.all_reduce, torch.ones(size)) for _ in range(ranks)]


def make_barrier(ranks: int) -> Calls:
    return [dist.barrier] * ranks


def make_all_gather(ranks: int) -> Calls:
    """The list form: every rank owns one tensor a rank, each with memory of its own."""
    return [
        functools.partial(dist.all_gather, [torch.zeros(SMALL) for _ in range(ranks)], torch.ones(SMALL))
        for _ in range(ranks)
    ]


def make_all_gather_into_tensor(ranks: int) -> Calls:
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name from torch 2.13 on
    return [functools.partial(gather, torch.zeros(SMALL * ranks), torch.ones(SMALL)) for _ in range(ranks)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """One collective.

    Attributes:
        title: how the table names it.
        make: builds each rank's call before the run, so that tensors are not made while time is taken.
        iterations: how many calls are timed at each number of ranks; few where one call takes seconds.
        warm: whether an untimed call comes first (else only a barrier).
    """

    title: str
    make: Callable[[int], Calls]
    iterations: dict[int, int]
    warm: bool = True


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "all_reduce": Operation(
            title="all_reduce, 16 floats",
            make=make_all_reduce,
            iterations={8: 500, 64: 60, 256: 16, 1024: 4},
        ),
        "barrier": Operation(title="barrier", make=make_barrier, iterations={8: 500, 64: 60, 256: 16, 1024: 4}),
        "all_gather": Operation(
            title="all_gather, 16 floats into a list",
            make=make_all_gather,
            iterations={8: 200, 64: 10, 256: 1, 1024: 1},
            warm=False,
        ),
        "all_gather_into_tensor": Operation(
            title="all_gather_into_tensor, 16 floats",
            make=make_all_gather_into_tensor,
            iterations={8: 200, 64: 20, 256: 4, 1024: 1},
            warm=False,
        ),
        "all_reduce_big": Operation(
            title="all_reduce, 1M floats",
            make=functools.partial(make_all_reduce, size=BIG),
            iterations={8: 10},
        ),
    }
)


COMPARED: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "all_reduce": (8, 64, 256, 1024),
        "barrier": (8, 64, 256, 1024),
        "all_gather": (64, 256, 1024),
        "all_gather_into_tensor": (64, 256, 1024),
        "all_reduce_big": (8,),
    }
)
"""Numbers of ranks at which each operation is measured on simulated ranks and on the threaded group."""

ONE_CORE_RANKS = (8, 64, 256)
"""Numbers of ranks at which the threaded group is measured on one core too."""

GLOO_RANKS = (2, 4, 8)
"""Numbers of real processes."""


def timed(ranks: int, calls: Calls, iterations: int, *, warm: bool = True) -> Body:
    """A body that returns the microseconds of one call, divided by the number of ranks.

    Args:
        ranks: number of ranks.
        calls: each rank's call.
        iterations: how many calls are timed.
        warm: whether an untimed call comes first.
    """

    def body(rank: int) -> float:
        call = calls[rank]
        if warm:
            call()
        dist.barrier()
        begin = now()
        for _ in range(iterations):
            call()
        return (now() - begin) / iterations / ranks * 1e6

    return body
