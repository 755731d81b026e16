"""Programs drawn at random, on simulated ranks: legal ones pass under every schedule, faulty ones never.

``tests/processes/test_random_programs.py`` asks real gloo about the same programs.
"""

from functools import cache
from random import Random

import pytest
import torch
from hypothesis import given, settings
from programs.comparison import close, difference, smallest
from programs.faulty_programs import FAULTS, draw_fault
from programs.interpreter import main, operation_of
from programs.random_programs import (
    COMMON,
    COMPLEX,
    KINDS,
    ONLY_MESSAGES,
    REDUCING,
    REDUCTIONS,
    SYNCHRONOUS,
    Operation,
    Program,
    draw_program,
    programs,
    reduces,
    sample,
)

from lightrft.errors import SimulationError
from lightrft.sim import SimWorld

pytestmark = pytest.mark.slow

EACH = 20
"""Faulty programs of each kind."""

UNIQUE = {
    "another_dtype",
    "another_shape",
    "another_root",
    "another_reduction",
    "other_splits",
    "another_peer",
    "another_tag",
    "groups_in_another_order",
    "exception",
    "no_wait",
    "written_before_wait",
}
"""Faults that are blamed on their rank and line. The others make ranks lose each other, which has two sides."""


def simulated(program, **options):
    """What each operation left, by rank; what a legal program does not finish is an error."""
    return [found[0] for found in SimWorld(program.size, strict=True, **options).run(main, [program])]


# -- legal programs ---------------------------------------------------------------------------------------------------


def test_programs_make_use_of_everything():
    operations = [(program, operation) for program in sample(500) for operation in program.operations]
    alone = [operation for _, operation in operations]
    assert {operation.kind for operation in alone} == set(KINDS)
    assert {operation.kind for operation in alone if operation.asynchronous} == set(KINDS) - SYNCHRONOUS
    assert {operation.dtype for operation in alone} == {*COMMON, *COMPLEX, *ONLY_MESSAGES}
    reductions = {(o.kind, o.reduction, o.dtype) for o in alone if o.kind in REDUCING}
    known = {(k, r, d) for k in REDUCING for r in REDUCTIONS for d in (*COMMON, *COMPLEX) if reduces(r, d)}
    assert reductions <= known
    assert len(reductions) > 0.95 * len(known)
    sizes = {(program.size, len(program.members(operation))) for program, operation in operations}
    assert sizes >= {(size, members) for size in range(2, 5) for members in range(1, size + 1)}
    assert {size for size, _ in sizes} == set(range(2, 9))
    assert all(any(getattr(o, name) for o in alone) for name in ("future", "any_source", "real", "strided", "splits"))
    assert max(len(program.operations) for program in sample(500)) > 300
    assert {0, 1, 2} < {len(program.groups) for program in sample(500)}


def test_ranks_issue_and_wait_in_orders_of_their_own():
    found = sample(100)
    issued = [[[n for i, n in enumerate(s) if n not in s[:i]] for s in program.steps] for program in found]
    assert sum(any(order != sorted(order) for order in orders) for orders in issued) > 10
    waited = [[n for i, n in enumerate(steps) if n in steps[:i]] for program in found for steps in program.steps]
    assert sum(order != sorted(order) for order in waited) > 50


def test_a_program_can_be_run_again_from_what_it_prints():
    for program in sample(20):
        assert eval(repr(program), {"Program": Program, "Operation": Operation}) == program


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(programs(most=10))
def test_the_order_in_which_ranks_run_changes_no_value(program):
    expected = simulated(program, profile="gloo")
    for seed in range(2):
        assert simulated(program, profile="gloo", schedule="random", seed=seed) == expected


def test_the_order_in_which_reductions_add_stays_within_the_bound():
    rounded = 0
    for index in range(25):
        program = draw_program(Random(f"rounding {index}"), 2 + index % 7, 12)
        expected = simulated(program, profile="gloo")
        for order in ("ring", "tree", "permuted"):
            found = simulated(program, profile="gloo", numerics=order)
            assert difference(program, found, expected) is None
            rounded += found != expected
    assert rounded > 10


def test_a_wrong_value_is_beyond_the_bound():
    def left(*numbers, dtype=torch.float32):
        return str(dtype), (len(numbers),), torch.tensor(numbers, dtype=dtype).view(torch.uint8).numpy().tobytes()

    total = Operation(kind="all_reduce", real=True)
    one, next_to_one, off = left(1.0), left(1.0 + 2**-23), left(1.0 + 2**-18)
    assert close(total, 4, one, next_to_one)
    assert not close(total, 4, one, off)
    assert not close(Operation(kind="all_reduce", real=True, reduction="MAX"), 4, one, next_to_one)
    assert not close(Operation(kind="all_reduce"), 4, one, next_to_one)
    assert not close(Operation(kind="all_gather", real=True), 4, one, next_to_one)
    assert not close(total, 4, one, left(1.0, 1.0))


def test_a_difference_is_told_by_rank_and_operation_and_the_program_is_shrunk_to_it():
    program = next(p for p in sample(200) if p.operations[3].kind == "all_gather" and not p.operations[3].group)
    right = simulated(program, profile="gloo")
    assert difference(program, right, right) is None

    def wrong(program):
        found = simulated(program, profile="gloo")
        for number in found[1]:
            if number == 3:
                found[1][3][1], found[1][3][2] = found[1][3][2], found[1][3][1]
        return difference(program, found, simulated(program, profile="gloo"))

    assert wrong(program).startswith("rank 1, operation 3, Operation(kind='all_gather'")
    assert all(set(steps) == {3} for steps in smallest(program, wrong).steps)


# -- faulty programs --------------------------------------------------------------------------------------------------


@cache
def told_of(kind):
    """Of each faulty program of a kind: the fault, the error's class, the ranks to blame, and the fault's line."""
    found = []
    for index in range(EACH):
        fault = draw_fault(Random(f"{kind} {index}"), kind)
        try:
            simulated(fault.program, profile="gloo")
        except SimulationError as error:
            culprits = error.report.culprits
            lines = {operation_of(culprit.place.line) for culprit in culprits if culprit.rank == fault.rank}
            found.append((fault, type(error).__name__, {culprit.rank for culprit in culprits}, lines))
        else:
            found.append((fault, "nothing", set(), set()))
    return found


@pytest.mark.parametrize("kind", FAULTS)
def test_no_faulty_program_passes(kind):
    for fault, error, _, _ in told_of(kind):
        assert error in fault.expected, fault


@pytest.mark.parametrize("kind", FAULTS)
def test_the_program_without_the_fault_passes(kind):
    for fault, *_ in told_of(kind):
        simulated(fault.legal, profile="gloo")


@pytest.mark.parametrize("kind", sorted(UNIQUE))
def test_a_fault_at_one_line_is_blamed_on_its_rank_and_line(kind):
    for fault, _, ranks, lines in told_of(kind):
        assert fault.rank in ranks, fault
        assert fault.number is None or fault.number in lines, fault


def test_of_ranks_that_lose_each_other_the_faulty_one_is_mostly_among_those_to_blame():
    lost = [entry for kind in FAULTS if kind not in UNIQUE for entry in told_of(kind)]
    named = [fault for fault, _, ranks, _ in lost if fault.rank in ranks]
    assert len(named) >= 0.9 * len(lost), f"{len(named)} of {len(lost)}"


def test_few_ranks_are_to_blame():
    blamed = [len(ranks) for kind in FAULTS for _, _, ranks, _ in told_of(kind)]
    assert sum(count == 1 for count in blamed) > 0.6 * len(blamed)
    assert sum(count <= 2 for count in blamed) > 0.9 * len(blamed)
