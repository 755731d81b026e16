"""Runs a :class:`~programs.random_programs.Program` on a rank.

Each operation of a program is called from lines of its own: operation ``n`` from :data:`LINES` ``* (n + 1)`` on, so
that a report tells which one it means.
"""

from __future__ import annotations

import warnings
from datetime import timedelta
from functools import cache
from types import FunctionType

import torch
import torch.distributed as dist

from programs.random_programs import Operation, Program, values

LINES = 1000
FILE = "/a/random/program.py"

gather_into_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_into_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

CALLS = {}


def call(function):
    """A call takes what :class:`Here` tells, and returns its work (or works) and the tensors it leaves defined."""
    CALLS[function.__name__] = function
    return function


class LeftError(Exception):
    """The rank leaves the program, without a goodbye."""


class Here:
    """One operation as seen from one rank."""

    def __init__(self, program: Program, number: int, group, rank: int, started) -> None:
        self.operation = program.operations[number]
        self.number, self.group, self.rank, self.started = number, group, rank, started
        self.members = program.members(self.operation)
        self.me = self.members.index(rank)
        self.later = self.operation.asynchronous
        self.shape = self.operation.shape
        self.root = self.operation.root
        self.is_root = rank == self.root
        self.op = getattr(dist.ReduceOp, self.operation.reduction)

    def tensor(self, index=0, shape=None):
        """What this rank contributes as its tensor number ``index``."""
        salt = 31 * self.number + 7 * self.rank + index
        return self.laid_out(values(self.operation, self.shape if shape is None else shape, salt))

    def blank(self, shape=None):
        """Room for a result."""
        shape = self.shape if shape is None else shape
        return self.laid_out(torch.ones(shape).to(getattr(torch, self.operation.dtype)))

    def laid_out(self, tensor):
        if not self.operation.strided:
            return tensor
        return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]

    def dense(self, tensor):
        return tensor.clone(memory_format=torch.contiguous_format)

    def joined(self, shape=None):
        """The shape of all members' parts end to end."""
        shape = self.shape if shape is None else shape
        return (len(self.members) * shape[0], *shape[1:])

    def tensors(self):
        """The tensors of a coalesced operation, of several sizes."""
        return [self.tensor(index, self.sized(index)) for index in range(self.operation.count)]

    def sized(self, index):
        return (self.shape[0] + index, *self.shape[1:]) if self.shape else ()

    def thing(self, index=0):
        """An object to send."""
        return {"rank": self.rank, "number": self.number, "text": "x" * (self.rank + index)}


# -- collectives ------------------------------------------------------------------------------------------------------


@call
def all_reduce(here):
    x = here.tensor()
    return dist.all_reduce(x, here.op, here.group, async_op=here.later), [x]


@call
def all_reduce_coalesced(here):
    x = here.tensors()
    return dist.all_reduce_coalesced(x, here.op, here.group, async_op=here.later), x


@call
def reduce(here):
    x = here.tensor()
    work = dist.reduce(x, here.root, here.op, here.group, async_op=here.later)
    return work, [x] if here.is_root else []  # gloo leaves scratch in the others


@call
def broadcast(here):
    x = here.tensor() if here.is_root else here.blank()
    return dist.broadcast(x, here.root, here.group, async_op=here.later), [x]


@call
def all_gather(here):
    x, found = here.tensor(), [here.blank() for _ in here.members]
    return dist.all_gather(found, x, here.group, async_op=here.later), [x, *found]


@call
def all_gather_single(here):
    x, found = here.tensor(), here.blank(here.joined())
    return gather_into_single(found, x, here.group, async_op=here.later), [x, found]


@call
def all_gather_coalesced(here):
    x = here.tensors()
    found = [[here.blank(t.shape) for t in x] for _ in here.members]
    work = dist.all_gather_coalesced(found, x, here.group, async_op=here.later)
    return work, [*x, *(t for tensors in found for t in tensors)]


@call
def gather(here):
    x, found = here.tensor(), [here.blank() for _ in here.members] if here.is_root else None
    return dist.gather(x, found, here.root, here.group, async_op=here.later), [x, *(found or ())]


@call
def scatter(here):
    found, x = here.blank(), [here.tensor(m) for m in range(len(here.members))] if here.is_root else None
    return dist.scatter(found, x, here.root, here.group, async_op=here.later), [found, *(x or ())]


@call
def reduce_scatter(here):
    sizes = here.operation.splits[0] if here.operation.splits else None
    shapes = [(size, *here.shape[1:]) for size in sizes] if sizes else [here.shape for _ in here.members]
    found, x = here.dense(here.blank(shapes[here.me])), [here.tensor(m, shape) for m, shape in enumerate(shapes)]
    return dist.reduce_scatter(found, x, here.op, here.group, async_op=here.later), [found, *x]


@call
def reduce_scatter_single(here):
    found, x = here.blank(), here.tensor(shape=here.joined())
    return reduce_into_single(found, x, here.op, here.group, async_op=here.later), [found, x]


@call
def all_to_all(here):
    found, x = [here.blank() for _ in here.members], [here.tensor(m) for m in range(len(here.members))]
    return dist.all_to_all(found, x, here.group, async_op=here.later), [*found, *x]


@call
def all_to_all_single(here):
    splits = here.operation.splits
    sent = list(splits[here.me]) if splits else None
    received = [row[here.me] for row in splits] if splits else None
    found = here.blank((sum(received), *here.shape[1:]) if splits else here.shape)
    x = here.tensor(shape=(sum(sent), *here.shape[1:]) if splits else here.shape)
    return dist.all_to_all_single(found, x, received, sent, here.group, async_op=here.later), [found, x]


@call
def manager_all_reduce(here):
    x = here.tensors()
    with dist._coalescing_manager(here.group, async_ops=here.later) as manager:
        for tensor in x:
            dist.all_reduce(tensor, here.op, here.group)
    return manager if here.later else None, x


@call
def manager_all_gather_single(here):
    x = here.tensors()
    found = [here.blank(here.joined(t.shape)) for t in x]
    with dist._coalescing_manager(here.group, async_ops=here.later) as manager:
        for output, tensor in zip(found, x, strict=True):
            gather_into_single(output, tensor, here.group)
    return manager if here.later else None, [*x, *found]


@call
def manager_reduce_scatter_single(here):
    found = [here.blank(here.sized(index)) for index in range(here.operation.count)]
    x = [here.tensor(index, here.joined(t.shape)) for index, t in enumerate(found)]
    with dist._coalescing_manager(here.group, async_ops=here.later) as manager:
        for output, tensor in zip(found, x, strict=True):
            reduce_into_single(output, tensor, here.op, here.group)
    return manager if here.later else None, [*x, *found]


@call
def barrier(here):
    return dist.barrier(here.group, async_op=here.later), []


@call
def monitored_barrier(here):
    return dist.monitored_barrier(here.group), []


# -- objects and messages ---------------------------------------------------------------------------------------------


@call
def all_gather_object(here):
    found = [None for _ in here.members]
    return dist.all_gather_object(found, here.thing(), here.group), found


@call
def gather_object(here):
    found = [None for _ in here.members] if here.is_root else None
    return dist.gather_object(here.thing(), found, here.root, here.group), found or []


@call
def scatter_object_list(here):
    found, things = [None], [here.thing(m) for m in range(len(here.members))] if here.is_root else None
    return dist.scatter_object_list(found, things, here.root, here.group), found


@call
def broadcast_object_list(here):
    found = [here.thing(), here.thing(1)]
    return dist.broadcast_object_list(found, here.root, here.group), found


@call
def object_message(here):
    source, destination, _tag = here.operation.edges[0]
    found = [here.thing(), here.thing(1)]
    if here.rank == source:
        dist.send_object_list(found, destination, here.group)
    else:
        dist.recv_object_list(found, source, here.group)
    return None, found


@call
def message(here):
    source, destination, tag = here.operation.edges[0]
    x = here.tensor() if here.rank == source else here.blank()
    if here.rank == source and here.later:
        return dist.isend(x, destination, here.group, tag), [x]
    if here.rank == source:
        return dist.send(x, destination, here.group, tag), [x]
    source = None if here.operation.any_source else source
    if here.later:
        return dist.irecv(x, source, here.group, tag), [x]
    return None, [x, dist.recv(x, source, here.group, tag)]


@call
def stream(here):
    """Several messages that only their order tells apart."""
    kept, works = [], []
    for index, (source, destination, tag) in enumerate(here.operation.edges):
        kept.append(here.tensor(index) if here.rank == source else here.blank())
        if here.rank == source:
            works.append(dist.isend(kept[-1], destination, here.group, tag))
        else:
            works.append(dist.irecv(kept[-1], source, here.group, tag))
    if here.rank % 2:
        works.reverse()
    if not here.later:
        for work in works:
            work.wait()
    return works if here.later else None, kept


@call
def batch(here):
    kept, operations = [], []
    for source, destination, tag in here.operation.edges:
        if here.rank == source:
            kept.append(here.tensor(tag))
            operations.append(dist.P2POp(dist.isend, kept[-1], destination, here.group, tag))
        if here.rank == destination:
            kept.append(here.blank())
            operations.append(dist.P2POp(dist.irecv, kept[-1], source, here.group, tag))
    works = dist.batch_isend_irecv(operations[:: -1 if here.rank % 2 else 1])
    if not here.later:
        for work in works:
            work.wait()
    return works if here.later else None, kept


# -- what only faulty programs do -------------------------------------------------------------------------------------


@call
def fail(here):
    raise ValueError(f"rank {here.rank} fails on purpose")


@call
def leave(here):
    raise LeftError


@call
def write(here):
    """Write into the tensors of an operation under way, whose number is in the place of a root."""
    for tensor in here.started[here.root][1]:
        tensor.view(torch.uint8).bitwise_xor_(1)  # another value in every dtype
    return None, []


# -- a rank's life ----------------------------------------------------------------------------------------------------


@cache
def placed(kind: str, number: int) -> FunctionType:
    """The call of ``kind``, as if it stood in the lines of operation ``number``."""
    function = CALLS[kind]
    code = function.__code__.replace(co_filename=FILE, co_firstlineno=LINES * (number + 1))
    return FunctionType(code, function.__globals__, kind)


def operation_of(line: int) -> int:
    """The number of the operation that is called from a line."""
    return line // LINES - 1


def run(program: Program) -> dict[int, list]:
    """Run a program on this rank, within the default group: what each operation left, by its number."""
    rank = dist.get_rank()
    groups = make_groups(program, rank)
    results, started = {}, {}
    for number in program.steps[rank]:
        operation = program.operations[number]
        if number not in started:
            here = Here(program, number, groups[operation.group], rank, started)
            started[number] = placed(operation.kind, number)(here)
            if operation.asynchronous:
                continue
        else:
            wait(operation, started[number][0])
        results[number] = [told(entry) for entry in started[number][1]]
    for group, members in zip(groups[1:], program.groups, strict=True):
        if rank in members:
            dist.destroy_process_group(group)
    return results


def make_groups(program: Program, rank: int) -> list:
    order = list(range(len(program.groups)))
    if program.swapped_groups == rank:
        order[:2] = reversed(order[:2])
    made = {index: dist.new_group(list(program.groups[index])) for index in order}
    return [dist.group.WORLD, *(made[index] for index in sorted(made))]


def wait(operation: Operation, works) -> None:
    for work in works if isinstance(works, list) else [works]:
        if operation.future:
            work.get_future().wait()
        else:
            work.wait()


def told(entry):
    """What can be compared: dtype, shape and bytes of a tensor. The tensor is overwritten: nobody else may hold it."""
    if not isinstance(entry, torch.Tensor):
        return entry
    flat = entry.reshape(-1).clone(memory_format=torch.contiguous_format)
    found = (str(entry.dtype), tuple(entry.shape), flat.view(torch.uint8).numpy().tobytes())
    entry.zero_()
    return found


def main(programs: list[Program], seconds: float = 20) -> list[dict[int, list]] | None:
    """What each rank does: run programs one after the other."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=seconds))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = [run(program) for program in programs]
    except LeftError:
        return None
    dist.destroy_process_group()
    return found
