"""Programs with one fault: a legal program, changed on one rank in one way that no backend can do right.

What gloo and nccl cannot notice is not among the faults: two calls in the wrong order that are alike in everything, and
operations that one rank has for itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from random import Random

from programs.random_programs import (
    BARRIERS,
    OBJECTS,
    REDUCING,
    REDUCTIONS,
    ROOTED,
    Operation,
    Program,
    draw_program,
    dtypes_of,
    reduces,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A program with a fault.

    Attributes:
        kind: one of :data:`FAULTS`.
        rank: the rank that has it.
        program: the whole program.
        legal: the program without the fault.
        number: the operation at whose line it stands, or None where the fault is that nothing stands there.
        expected: names of the errors that may tell of it.
    """

    kind: str
    rank: int
    program: Program
    legal: Program
    number: int | None
    expected: tuple[str, ...]


MISMATCH = ("CollectiveMismatchError",)
LOST = ("DeadlockError", "CollectiveMismatchError")
FORGOTTEN = (*LOST, "UnfinishedError")
FAILED = ("RankFailedError",)


# -- what a rank can do wrong -----------------------------------------------------------------------------------------


def shared(program: Program, rank: int) -> list[int]:
    """Numbers of the operations that the rank has with others."""
    steps = dict.fromkeys(program.steps[rank])
    return [n for n in steps if program.partners(program.operations[n], rank)]


def with_steps(program: Program, rank: int, steps) -> Program:
    return replace(program, steps=(*program.steps[:rank], tuple(steps), *program.steps[rank + 1 :]))


def added(program: Program, operation: Operation) -> tuple[Program, int]:
    return replace(program, operations=(*program.operations, operation)), len(program.operations)


def instead(program: Program, rank: int, number: int, operation: Operation) -> tuple[Program, int]:
    """The rank does ``operation`` where the others do operation ``number``."""
    program, new = added(program, operation)
    return with_steps(program, rank, [new if n == number else n for n in program.steps[rank]]), new


def inserted(random: Random, program: Program, rank: int, operation: Operation) -> tuple[Program, int]:
    """The rank does ``operation`` besides, somewhere."""
    program, new = added(program, operation)
    steps = list(program.steps[rank])
    steps.insert(random.randint(0, len(steps)), new)
    return with_steps(program, rank, steps), new


def drop(random: Random, program: Program, rank: int):
    number = random.choice(shared(program, rank))
    return with_steps(program, rank, [n for n in program.steps[rank] if n != number]), None, FORGOTTEN


def swap(random: Random, program: Program, rank: int):
    """Two neighbours change places; another rank has a part in both, and blocks in the first."""
    steps = program.steps[rank]
    places = [p for p in range(len(steps) - 1) if collide(program, rank, steps[p], steps[p + 1])]
    place = random.choice(places)
    steps = (*steps[:place], steps[place + 1], steps[place], *steps[place + 2 :])
    return with_steps(program, rank, steps), steps[place], LOST


def collide(program: Program, rank: int, first: int, second: int) -> bool:
    one, two = program.operations[first], program.operations[second]
    blocking = not one.asynchronous and not two.asynchronous
    common = program.partners(one, rank) & program.partners(two, rank)
    return blocking and bool(common) and (one.group != two.group or one.kind != two.kind)


def another_dtype(random: Random, program: Program, rank: int):
    number = random.choice([n for n in shared(program, rank) if has_tensors(program, n)])
    operation = program.operations[number]
    others = [d for d in dtypes_of(operation.kind, operation.reduction) if d != operation.dtype]
    return *instead(program, rank, number, plain(operation, dtype=random.choice(others))), MISMATCH


def another_shape(random: Random, program: Program, rank: int):
    number = random.choice([n for n in shared(program, rank) if has_tensors(program, n) and not splits(program, n)])
    operation = program.operations[number]
    rows = len(program.members(operation)) if operation.kind == "all_to_all_single" else 1
    longer = (operation.shape[0] + rows, *(size or 1 for size in operation.shape[1:])) if operation.shape else (2,)
    return *instead(program, rank, number, plain(operation, shape=longer)), MISMATCH


def another_root(random: Random, program: Program, rank: int):
    number = random.choice([n for n in shared(program, rank) if program.operations[n].kind in ROOTED])
    operation = program.operations[number]
    others = [member for member in program.members(operation) if member != operation.root]
    return *instead(program, rank, number, replace(operation, root=random.choice(others))), MISMATCH


def another_reduction(random: Random, program: Program, rank: int):
    number = random.choice([n for n in shared(program, rank) if program.operations[n].kind in REDUCING])
    operation = program.operations[number]
    others = [r for r in REDUCTIONS if r != operation.reduction and reduces(r, operation.dtype)]
    return *instead(program, rank, number, replace(operation, reduction=random.choice(others))), MISMATCH


def other_splits(random: Random, program: Program, rank: int):
    """The rank sends one row to another member than that one expects it from."""
    number = random.choice([n for n in shared(program, rank) if splits(program, n) == "all_to_all_single"])
    operation = program.operations[number]
    me = program.members(operation).index(rank)
    row = list(operation.splits[me])
    less = random.choice([m for m, size in enumerate(row) if size])
    more = random.choice([m for m in range(len(row)) if m != less])
    row[less] -= 1
    row[more] += 1
    changed = (*operation.splits[:me], tuple(row), *operation.splits[me + 1 :])
    return *instead(program, rank, number, replace(operation, splits=changed)), MISMATCH


def another_group(random: Random, program: Program, rank: int):
    bound = (*ROOTED, "all_to_all_single", "reduce_scatter")  # to the members and their number
    number = random.choice([n for n in shared(program, rank) if program.operations[n].kind not in bound])
    operation = program.operations[number]
    groups = [tuple(range(program.size)), *program.groups]
    wide = {*program.members(operation)} if operation.edges else {rank}
    others = [g for g, members in enumerate(groups) if wide <= set(members) and g != operation.group]
    program, new = instead(program, rank, number, replace(operation, group=random.choice(others)))
    return program, None if operation.asynchronous else new, FORGOTTEN


def groups_in_another_order(random: Random, program: Program, rank: int):
    one, two = program.groups[0], program.groups[1]
    if set(one) == set(two):
        raise IndexError
    return replace(program, swapped_groups=rank), None, MISMATCH


def another_peer(random: Random, program: Program, rank: int):
    number, (source, destination, tag) = one_message(random, program, rank)
    others = set(program.members(program.operations[number])) - {source, destination}
    other = random.choice(sorted(others))
    edge = (source, other, tag) if rank == source else (other, destination, tag)
    operation = replace(program.operations[number], edges=(edge,), any_source=False)
    return *instead(program, rank, number, operation), FORGOTTEN


def another_tag(random: Random, program: Program, rank: int):
    number, (source, destination, tag) = one_message(random, program, rank)
    operation = replace(program.operations[number], edges=((source, destination, tag + 50),))
    return *instead(program, rank, number, operation), FORGOTTEN


def one_message(random: Random, program: Program, rank: int) -> tuple[int, tuple[int, int, int]]:
    number = random.choice([n for n in shared(program, rank) if program.operations[n].kind == "message"])
    return number, program.operations[number].edges[0]


def message_too_many(random: Random, program: Program, rank: int):
    """A send that nobody receives, or a receive for which nobody sends."""
    peer = random.choice([other for other in range(program.size) if other != rank])
    edge = random.choice([(rank, peer, 7), (peer, rank, 7)])
    operation = Operation(kind="message", edges=(edge,), asynchronous=random.random() < 0.5)
    return *inserted(random, program, rank, operation), FORGOTTEN


def call_too_many(random: Random, program: Program, rank: int):
    return *inserted(random, program, rank, Operation(kind=random.choice(("all_reduce", "barrier")))), LOST


def no_wait(random: Random, program: Program, rank: int):
    number = random.choice([n for n in shared(program, rank) if program.steps[rank].count(n) == 2])
    steps = list(program.steps[rank])
    del steps[len(steps) - 1 - steps[::-1].index(number)]
    return with_steps(program, rank, steps), number, ("UnfinishedError",)


def early_return(random: Random, program: Program, rank: int):
    last = program.steps[rank].index(random.choice(shared(program, rank)))
    program, new = added(program, Operation(kind="leave"))
    return with_steps(program, rank, [*program.steps[rank][:last], new]), None, FORGOTTEN


def exception(random: Random, program: Program, rank: int):
    return *inserted(random, program, rank, Operation(kind="fail")), FAILED


def written_before_wait(random: Random, program: Program, rank: int):
    """Another value in a tensor that is under way; the error comes with the wait, at the line of the operation."""
    steps = program.steps[rank]
    number = random.choice([n for n in shared(program, rank) if steps.count(n) == 2 and filled(program, n)])
    program, new = added(program, Operation(kind="write", root=number))
    place = random.randint(steps.index(number) + 1, len(steps) - 1 - steps[::-1].index(number))
    return with_steps(program, rank, [*steps[:place], new, *steps[place:]]), None, FAILED


def has_tensors(program: Program, number: int) -> bool:
    return program.operations[number].kind not in (*OBJECTS, *BARRIERS)


def filled(program: Program, number: int) -> bool:
    operation = program.operations[number]
    return (
        has_tensors(program, number)
        and operation.kind != "reduce"
        and prod(operation.shape) > 0
        and not operation.splits
    )


def splits(program: Program, number: int) -> str:
    return program.operations[number].kind if program.operations[number].splits else ""


def plain(operation: Operation, **changes) -> Operation:
    return replace(operation, real=False, strided=False, any_source=False, **changes)


FAULTS = {
    function.__name__: function
    for function in (
        drop,
        swap,
        another_dtype,
        another_shape,
        another_root,
        another_reduction,
        other_splits,
        another_group,
        groups_in_another_order,
        another_peer,
        another_tag,
        message_too_many,
        call_too_many,
        no_wait,
        early_return,
        exception,
        written_before_wait,
    )
}


def without_deadlines(program: Program) -> Program:
    """Ordinary barriers in the place of monitored ones, which would make a timeout of a deadlock."""
    barriers = [replace(o, kind="barrier") if o.kind == "monitored_barrier" else o for o in program.operations]
    return replace(program, operations=tuple(barriers))


def draw_fault(random: Random, kind: str) -> Fault:
    """A legal program of a few operations with one fault: programs are drawn until the fault fits in."""
    while True:
        size = random.choice((2, 3, 3, 4, 4, 5))
        program = without_deadlines(draw_program(random, size, random.randint(5, 15)))
        rank = random.randrange(size)
        try:
            faulty, number, expected = FAULTS[kind](random, program, rank)
        except IndexError:  # nothing to choose from
            continue
        return Fault(kind=kind, rank=rank, program=faulty, legal=program, number=number, expected=expected)
