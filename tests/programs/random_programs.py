"""Programs drawn at random: legal by construction on gloo, plain data, and the same on every machine.

A :class:`Program` holds a list of operations and, for each rank, the order in which it issues and waits for them. All
ranks follow one global order, so that each may block in any operation; only asynchronous operations that gloo keeps
apart change places. ``programs.interpreter`` runs a program on a rank.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cache
from math import prod
from random import Random

import torch
from hypothesis import strategies as st

COMMON = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int8", "uint8", "bool")
FLOATING = COMMON[:4]
COMPLEX = ("complex64", "complex128")
ONLY_MESSAGES = ("int16", "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
REDUCTIONS = ("SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR")

REDUCING = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_single",
    "manager_all_reduce",
    "manager_reduce_scatter_single",
)
ROOTED = ("reduce", "broadcast", "gather", "scatter", "gather_object", "scatter_object_list", "broadcast_object_list")
MOVING = (
    "broadcast",
    "all_gather",
    "all_gather_single",
    "all_gather_coalesced",
    "gather",
    "scatter",
    "all_to_all",
    "all_to_all_single",
    "manager_all_gather_single",
)
OBJECTS = ("all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list", "object_message")
BARRIERS = ("barrier", "monitored_barrier")
MESSAGES = ("message", "batch", "stream")
KINDS = (*REDUCING, *REDUCING, *MOVING, *OBJECTS, *BARRIERS, *MESSAGES, *MESSAGES)
ROUNDED = ("SUM", "AVG", "PRODUCT")

SPLITTING = frozenset(kind for kind in KINDS if "single" in kind)
"""What splits or joins tensors along dimension 0, and so takes no scalars."""

COALESCED = frozenset(kind for kind in KINDS if "coalesced" in kind or "manager" in kind)
WITHOUT_COMPLEX = frozenset({"gather"})
SYNCHRONOUS = frozenset({*OBJECTS, "monitored_barrier"})
WITHOUT_FUTURE = frozenset({*MESSAGES, "reduce_scatter", "reduce_scatter_single", *COALESCED})
STRIDED = frozenset(
    {*COALESCED, "all_gather", "all_gather_single", "gather", "all_to_all", "reduce_scatter", "reduce_scatter_single"}
)
"""Where gloo copies, and so gets tensors right that are not contiguous (of reduce_scatter, the inputs)."""

SHAPES = ((3,), (1,), (5,), (2, 3), (1, 2, 2, 1), (3, 1, 2), (0,), (0, 3), (2, 0), ())
LARGE = ((1031,), (64, 33))


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Operation:
    """One collective, or some messages.

    Attributes:
        kind: one of :data:`KINDS`, or what a faulty program does instead (``fail``, ``leave``, ``write``).
        group: 0 for the world, else the position in ``Program.groups``, from 1.
        dtype: name of the dtype.
        shape: what each member contributes, or gets where the others contribute more.
        reduction: name of the reduce operation.
        root: global rank.
        splits: of all_to_all_single, what member ``s`` sends to member ``r`` along dimension 0 (row ``s``, column
            ``r``; none for equal parts); of reduce_scatter, one row: the size along dimension 0 for each member.
        edges: messages as (source, destination, tag), in global ranks.
        count: number of tensors of a coalesced operation.
        asynchronous: whether a rank goes on and waits later.
        future: whether it waits through the future.
        any_source: whether the receiver of a message does not name its source.
        real: whether the values are real numbers, whose sums are rounded, and not small whole numbers.
        strided: whether the tensors are not contiguous.
    """

    kind: str
    group: int = 0
    dtype: str = "float32"
    shape: tuple[int, ...] = (3,)
    reduction: str = "SUM"
    root: int = 0
    splits: tuple[tuple[int, ...], ...] = ()
    edges: tuple[tuple[int, int, int], ...] = ()
    count: int = 1
    asynchronous: bool = False
    future: bool = False
    any_source: bool = False
    real: bool = False
    strided: bool = False

    def __repr__(self) -> str:
        told = [f"kind={self.kind!r}"]
        told += [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in fields(self)
            if field.name != "kind" and getattr(self, field.name) != field.default
        ]
        return f"Operation({', '.join(told)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """What ``size`` ranks do.

    Attributes:
        size: number of ranks.
        groups: members of each sub-group, as given to ``new_group``.
        operations: all operations, known by their number.
        steps: for each rank, numbers of operations: the first time a number comes the rank issues the operation, the
            second time it waits for it.
        swapped_groups: a rank that makes its first two groups in the wrong order, if any.
    """

    size: int
    groups: tuple[tuple[int, ...], ...] = ()
    operations: tuple[Operation, ...]
    steps: tuple[tuple[int, ...], ...]
    swapped_groups: int | None = None

    def members(self, operation: Operation) -> tuple[int, ...]:
        """Global ranks of the operation's group, in the order of their ranks in it."""
        return tuple(sorted(self.groups[operation.group - 1])) if operation.group else tuple(range(self.size))

    def partners(self, operation: Operation, rank: int) -> set[int]:
        """The other ranks whose calls ``rank`` waits for in the operation."""
        if operation.edges:
            return {end for edge in operation.edges for end in edge[:2] if rank in edge[:2]} - {rank}
        return set(self.members(operation)) - {rank}

    def without(self, numbers: set[int]) -> Program:
        """The same program without some operations: legal if this one is. What remains keeps its number."""
        return replace(self, steps=tuple(tuple(n for n in steps if n not in numbers) for steps in self.steps))


# -- operations -------------------------------------------------------------------------------------------------------


@cache
def reduces(reduction: str, dtype: str) -> bool:
    """Whether gloo reduces the dtype so."""
    kind = getattr(torch, dtype)
    if kind.is_complex:
        return reduction in ("SUM", "AVG")
    if reduction == "AVG":
        return kind.is_floating_point
    return not (reduction in ("BAND", "BOR", "BXOR") and kind.is_floating_point)


@cache
def dtypes_of(kind: str, reduction: str = "SUM") -> tuple[str, ...]:
    """What gloo takes for an operation."""
    if kind in MESSAGES:
        return (*COMMON, *COMPLEX, *ONLY_MESSAGES)
    known = COMMON if kind in WITHOUT_COMPLEX else (*COMMON, *COMPLEX)
    return tuple(dtype for dtype in known if kind not in REDUCING or reduces(reduction, dtype))


def takes_strides(kind: str, dtype: str) -> bool:
    """Whether gloo gets tensors right that are not contiguous; it stumbles over one complex number in a list."""
    return kind in STRIDED and not (kind in ("all_reduce_coalesced", "manager_all_reduce") and dtype in COMPLEX)


def draw_operation(random: Random, groups: list[tuple[int, ...]], number: int) -> Operation:
    """An operation on one of ``groups``, of which the first is the world."""
    kind = random.choice(KINDS)
    two = [index for index, members in enumerate(groups) if len(members) > 1]
    group = random.choice(two if kind in (*MESSAGES, "object_message") else range(len(groups)))
    members = sorted(groups[group])
    reduction = random.choice((*REDUCTIONS, *ROUNDED)) if kind in REDUCING else "SUM"
    rounded = kind in REDUCING and reduction in ROUNDED and random.random() < 0.5
    dtype = random.choice(FLOATING if rounded else dtypes_of(kind, reduction))
    shape = random.choice(LARGE if random.random() < 0.03 else SHAPES[:-1] if kind in SPLITTING else SHAPES)
    asynchronous = kind not in SYNCHRONOUS and random.random() < 0.5
    operation = Operation(
        kind=kind,
        group=group,
        dtype=dtype,
        shape=shape,
        reduction=reduction,
        root=random.choice(members) if kind in ROOTED else 0,
        count=random.randint(1, 3) if kind in COALESCED else 1,
        asynchronous=asynchronous,
        future=asynchronous and kind not in WITHOUT_FUTURE and random.random() < 0.2,
        real=getattr(torch, dtype).is_floating_point and dtype not in ONLY_MESSAGES and random.random() < 0.6,
        strided=takes_strides(kind, dtype) and shape != () and random.random() < 0.2,
    )
    if kind in (*OBJECTS, *BARRIERS):  # without tensors
        plain = Operation(
            kind=kind, group=group, root=operation.root, asynchronous=asynchronous, future=operation.future
        )
        return draw_message(random, plain, members, number) if kind == "object_message" else plain
    if kind == "message":
        return draw_message(random, operation, members, number)
    if kind == "batch":
        return replace(operation, edges=draw_edges(random, members))
    if kind == "stream":
        return replace(operation, edges=((*random.sample(members, 2), 5),) * random.randint(2, 4))
    if kind == "all_to_all_single" and random.random() < 0.6:
        return replace(operation, splits=tuple(tuple(random.randint(0, 3) for _ in members) for _ in members))
    if kind == "all_to_all_single":
        return replace(operation, shape=(shape[0] * len(members), *shape[1:]))
    if kind == "reduce_scatter" and shape and random.random() < 0.4:
        return replace(operation, splits=(tuple(random.randint(0, 3) for _ in members),))
    return operation


def draw_message(random: Random, operation: Operation, members: list[int], number: int) -> Operation:
    source, destination = random.sample(members, 2)
    any_source = operation.kind == "message" and prod(operation.shape) > 0 and random.random() < 0.15
    tag = 100 + number if any_source else random.randint(0, 2)  # nobody else sends with the tag
    return replace(operation, edges=((source, destination, tag),), any_source=any_source)


def draw_edges(random: Random, members: list[int]) -> tuple[tuple[int, int, int], ...]:
    pairs = [tuple(random.sample(members, 2)) for _ in range(random.randint(1, len(members) + 1))]
    return tuple((source, destination, 10 + position) for position, (source, destination) in enumerate(pairs))


# -- programs ---------------------------------------------------------------------------------------------------------


def draw_program(random: Random, size: int, count: int) -> Program:
    """A legal program of ``count`` operations for ``size`` ranks."""
    groups = [tuple(random.sample(range(size), random.randint(1, size))) for _ in range(random.randint(0, 3))]
    operations = [draw_operation(random, [tuple(range(size)), *groups], number) for number in range(count)]
    program = Program(size=size, groups=tuple(groups), operations=tuple(operations), steps=((),) * size)
    steps = tuple(draw_steps(random, program, rank) for rank in range(size))
    return replace(program, steps=steps)


def draw_steps(random: Random, program: Program, rank: int) -> tuple[int, ...]:
    """The operations that ``rank`` has a part in, in their order, and waits anywhere behind the asynchronous ones."""
    steps: list[int] = []
    pending: list[int] = []
    for number, operation in enumerate(program.operations):
        if rank not in participants(program, operation):
            continue
        before = program.operations[steps[-1]] if steps and steps.count(steps[-1]) == 1 else None
        steps.append(number)
        if before is not None and may_change_places(before, operation) and random.random() < 0.5:
            steps[-2:] = reversed(steps[-2:])
        if operation.asynchronous:
            pending.append(number)
        while pending and random.random() < 0.3:
            steps.append(pending.pop(random.randrange(len(pending))))
    random.shuffle(pending)
    return (*steps, *pending)


def participants(program: Program, operation: Operation) -> set[int]:
    if operation.edges:
        return {end for edge in operation.edges for end in edge[:2]}
    return set(program.members(operation))


def may_change_places(one: Operation, two: Operation) -> bool:
    """Whether some ranks may issue the operations in one order, some in the other: gloo keeps them apart."""
    apart = one.group != two.group or bool(one.edges) != bool(two.edges)
    return one.asynchronous and two.asynchronous and apart


def programs(sizes: tuple[int, ...] = (2, 3, 4), most: int = 12) -> st.SearchStrategy[Program]:
    """Hypothesis strategy of legal programs."""
    return st.builds(
        draw_program, st.randoms(use_true_random=False), size=st.sampled_from(sizes), count=st.integers(1, most)
    )


def sample(count: int, seed: str = "0") -> list[Program]:
    """``count`` legal programs: most are short and for 2 to 4 ranks, one in 20 has more, one in 50 is long."""
    found = []
    for index in range(count):
        random = Random(f"program {seed} {index}")
        size = random.randint(5, 8) if index % 20 == 19 else random.choice((2, 2, 3, 3, 4))
        length = random.randint(200, 400) if index % 50 == 49 else random.randint(4, 24)
        found.append(draw_program(random, size, min(length, 24) if size > 4 else length))
    return found


# -- values -----------------------------------------------------------------------------------------------------------

LARGEST = 2.0
"""Real values lie between a quarter of this and this, with either sign."""


def values(operation: Operation, shape: tuple[int, ...], salt: int) -> torch.Tensor:
    """What a rank contributes: drawn from ``salt``, of the operation's dtype.

    Whole values are small enough that eight of them add and multiply exactly in every dtype.
    """
    dtype, count = getattr(torch, operation.dtype), prod(shape)
    if operation.dtype in ONLY_MESSAGES:
        return ((torch.arange(count * dtype.itemsize) * 5 + salt) % 100).to(torch.uint8).view(dtype).reshape(shape)
    if operation.real:
        fraction = (torch.arange(count, dtype=torch.float64) * 0.618034 + salt * 0.414214) % 1
        return ((0.25 + 0.75 * fraction) * (LARGEST if salt % 3 else -LARGEST)).to(dtype).reshape(shape)
    found = (torch.arange(count) * 3 + salt) % 5
    if operation.reduction == "PRODUCT":
        found = 1 + found % 2
    if dtype.is_complex:
        return torch.complex(found.double(), ((found + salt) % 3).double()).to(dtype).reshape(shape)
    return (found % 2 if dtype is torch.bool else found).to(dtype).reshape(shape)
