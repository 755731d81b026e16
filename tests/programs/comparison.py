"""Compares what came of a :class:`~programs.random_programs.Program` in two worlds.

What a program left is a list over ranks, of what each operation left there, by its number.
"""

from __future__ import annotations

import torch

from programs.random_programs import LARGEST, REDUCING, Operation, Program

Left = list[dict[int, list]]


def difference(program: Program, found: Left, expected: Left) -> str | None:
    """The first operation and rank whose values differ, given those of every rank."""
    for rank, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        if mine.keys() != theirs.keys():
            return f"rank {rank} did {sorted(mine)} and {sorted(theirs)}"
        for number in mine:
            operation = program.operations[number]
            members = len(program.members(operation))
            if len(mine[number]) != len(theirs[number]) or not all(
                close(operation, members, one, two) for one, two in zip(mine[number], theirs[number], strict=True)
            ):
                return f"rank {rank}, operation {number}, {operation}: {mine[number]} and {theirs[number]}"
    return None


def smallest(program: Program, fails) -> Program:
    """A program that fails still, and of which no operation can be left out."""
    for number in reversed(range(len(program.operations))):
        shorter = program.without({number})
        if fails(shorter):
            program = shorter
    return program


def spoils(legal: Program, found: Left, right: Left) -> bool:
    """Whether an operation of a legal program left other values on some rank than are right, in a faulty run."""
    return any(
        len(values) != len(right[rank][number])
        or not all(
            close(legal.operations[number], len(legal.members(legal.operations[number])), *pair)
            for pair in zip(values, right[rank][number], strict=True)
        )
        for rank, results in enumerate(found)
        for number, values in (results or {}).items()
        if number in right[rank]
    )


def close(operation: Operation, members: int, one, two) -> bool:
    """Equal, or within the bound of two sums (or products) of the same numbers in different orders."""
    if one == two:
        return True
    if operation.kind not in REDUCING or not operation.real or one[:2] != two[:2]:
        return False
    left, right = (
        torch.frombuffer(bytearray(e[2]), dtype=getattr(torch, operation.dtype)).double() for e in (one, two)
    )
    return bool(((left - right).abs() <= bound(operation, members, right)).all())


def bound(operation: Operation, members: int, value: torch.Tensor) -> torch.Tensor | float:
    """How far two reductions of the same numbers may be apart, whatever their order.

    With the unit roundoff ``u`` and ``gamma(k) = k u / (1 - k u)``, a sum of n numbers, added in any order, is off by
    at most ``gamma(n - 1)`` times the sum of their magnitudes, and a product by at most the factor ``gamma(n - 1)``
    (Higham, Accuracy and Stability of Numerical Algorithms, 2nd edition, equation 4.4 and lemma 3.1). An average
    divides once more: ``gamma(n)``. Both sides may be off, so that it counts twice. Extrema are exact.
    """
    roundoff = torch.finfo(getattr(torch, operation.dtype)).eps / 2
    steps = members if operation.reduction == "AVG" else members - 1
    gamma = steps * roundoff / (1 - steps * roundoff)
    match operation.reduction:
        case "SUM":
            return 2 * gamma * members * LARGEST
        case "AVG":
            return 2 * gamma * LARGEST
        case "PRODUCT":
            return 2 * gamma / (1 - gamma) * value.abs()
    return 0.0
