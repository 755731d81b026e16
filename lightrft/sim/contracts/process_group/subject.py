"""What a check of process groups gets: how to run a function on ranks, and the values that ranks work with."""

from __future__ import annotations

import atexit
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import SkipTest

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from lightrft.errors import SimulationError

__all__ = [
    "Again",
    "Subject",
    "all_gather_single",
    "everybodys",
    "flat",
    "last_rank",
    "lists",
    "members",
    "mine",
    "reduce_scatter_single",
    "total",
]

# torch 2.13 gave these two new names
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

Body = Callable[[], Any]
"""What a rank does once it has the default group. It is pickled for ranks in other processes."""


class World(Protocol):
    """N ranks that run one function, as ``SimWorld`` and ``ProcessWorld`` are."""

    def run(self, fn: Callable[..., Any], /, *args: Any) -> list[Any]:
        """Run ``fn`` on every rank, with the variables of torchrun set; what it returned, by rank."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An implementation of process groups.

    Attributes:
        world: makes a world of so many ranks.
        backend: what ``init_process_group`` is called with.
        name: how messages call it.
        lacks: capabilities that it does not have, each with the reason.
        device: type of device on which the tensors of the checks lie.
        most_ranks: how many ranks it can have, such as the number of GPUs. Checks run on fewer ranks where that makes
            sense and are skipped where it does not. None if there is no limit.
    """

    world: Callable[[int], World]
    backend: str | None
    name: str
    lacks: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    most_ranks: int | None = None

    def run(self, body: Body, ranks: int = 3, *, least: int = 1, bound: bool = False) -> list[Any]:
        """Run ``body()`` on ranks that have the default group.

        Args:
            body: what each rank does.
            ranks: how many ranks there are, if the implementation can have that many.
            least: with how many ranks the check still makes sense.
            bound: whether the default group is bound to a device.

        Returns:
            what the ranks returned, by rank.
        """
        size = ranks if self.most_ranks is None else min(ranks, self.most_ranks)
        if size < least:
            raise SkipTest(f"needs {least} ranks, and {self.name} can have {size}")
        return self.world(size).run(_on_rank, body, self.backend, self.device, bound)

    def expect(self, body: Body, expected: Callable[[int, int], Any], ranks: int = 3, *, least: int = 1) -> None:
        """Rank ``r`` of ``n`` returns ``expected(r, n)`` from ``body()``, exactly."""
        found = self.run(body, ranks, least=least)
        for rank, value in enumerate(found):
            wanted = expected(rank, len(found))
            if value != wanted:
                raise AssertionError(f"rank {rank} of {len(found)} has\n  {value!r}\nand should have\n  {wanted!r}")

    def refuses(self, *bodies: Body, ranks: int = 3, least: int = 1) -> None:
        """Each of ``bodies`` raises on every rank, and the group works afterwards."""
        self.expect(_Refused(bodies), lambda _rank, size: ["refused", float(size)] * len(bodies), ranks, least=least)

    def fails(self, body: Body, ranks: int = 3) -> SimulationError:
        """The error with which the run of ``body`` ends; a run that does not fail is one too."""
        try:
            found = self.run(body, ranks, least=ranks)
        except SimulationError as error:
            return error
        raise AssertionError(f"the run did not fail: the ranks returned {found!r}")


def _on_rank(body: Body, backend: str | None, device: str, bound: bool) -> Any:
    own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # torch warns of names that it has replaced, and those are checked too
        if device == "cuda":
            torch.cuda.set_device(own)
            stack.enter_context(torch.device(own))
        dist.init_process_group(backend, device_id=own if bound else None)
        atexit.register(_keep, distributed_c10d._get_default_store())
        dist.barrier()  # nobody leaves while others still connect
        result = body()
        if dist.is_initialized():
            dist.destroy_process_group()
    return result


def _keep(store: object) -> None:
    """An exit function that keeps the store: rank 0 serves it, and may be done before others have made their groups."""


class Again:
    """Makes another default group after this one.

    Ranks meet in the store of the first one: a new server at the same address might not be there yet when a rank that
    is ahead looks for it.
    """

    def __init__(self, backend: str | None) -> None:
        self._backend = backend
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        store = distributed_c10d._get_default_store()
        self._store = dist.PrefixStore("again", store)  # type: ignore[attr-defined]

    def init(self) -> None:
        """Make the group; the first one must be gone by now."""
        dist.init_process_group(self._backend, store=self._store, rank=self._rank, world_size=self._size)


class _Refused:
    """Calls functions that should raise, and shows after each that the group still works."""

    def __init__(self, bodies: Sequence[Body]) -> None:
        self.bodies = bodies

    def __call__(self) -> list[str | float]:
        found: list[str | float] = []
        for body in self.bodies:
            try:
                result = body()
            except (RuntimeError, ValueError, TypeError, IndexError):
                found.append("refused")
            else:
                found.append(f"accepted, with the result {result!r}")
            tensor = torch.ones(1)
            dist.all_reduce(tensor)
            found.append(tensor.item())
        return found


def mine(count: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """This rank's tensor: 10 times the rank, and counting on from there."""
    return (torch.arange(count) + 10 * dist.get_rank()).to(dtype)


def everybodys(size: int, count: int = 2) -> list[list[float]]:
    """The values of :func:`mine` on all ranks."""
    return [[10.0 * rank + position for position in range(count)] for rank in range(size)]


def flat(rows: Sequence[Sequence[float]]) -> list[float]:
    """The values of all rows, one row after the other."""
    return [value for row in rows for value in row]


def total(size: int, count: int = 2) -> list[float]:
    """The sum of :func:`mine` over all ranks."""
    return [sum(column) for column in zip(*everybodys(size, count), strict=True)]


def lists(tensors: Sequence[Tensor]) -> list[Any]:
    """The values of tensors."""
    return [tensor.tolist() for tensor in tensors]


def last_rank() -> int:
    """The rank that is the root where one is needed: not 0, so that a root that is ignored shows."""
    return dist.get_world_size() - 1


def members(group: dist.ProcessGroup | int | None) -> list[int] | None:
    """The ranks that a collective on the group finds, in its order; None outside of it."""
    if group is None or isinstance(group, int):  # torch's mark of a rank that is no member
        return None
    found = torch.empty(dist.get_world_size(group), dtype=torch.int64)
    all_gather_single(found, torch.tensor([dist.get_rank()]), group=group)
    return [int(rank) for rank in found.tolist()]
