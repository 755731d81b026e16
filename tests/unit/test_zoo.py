"""The zoo: pairs of programs, broken and mended, and what the simulator has to say about them.

A module of ``zoo/`` holds the two programs and what is expected of the broken one: the class of the error
(``EXPECTED``, and ``CAUSE`` where a rank raised), the ranks to blame (``RANKS``) and the lines, marked in the source::

    # <- blamed              where every rank of RANKS is
    # <- waits               where all other ranks are
    # <- waits (ranks 0, 2)  where these are, if the others are not all in one place

``SIZE`` is the number of ranks, ``OPTIONS`` what else the world is made with, ``SAYS`` a part of the message, ``ROW`` a
row of the table of failures. The arguments of both programs, if there are any, come from ``arguments()``.
"""

import functools
import re
import sys
import warnings
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

import pytest

from lightrft.errors import SimulationError
from lightrft.sim import SimWorld
from lightrft.sim.divergence import Report

ZOO = Path(__file__).parent / "zoo"
NAMES = sorted(path.stem for path in ZOO.glob("*.py"))
FIFO = {"schedule": "fifo"}
SCHEDULES = [FIFO, *({"schedule": "random", "seed": seed} for seed in range(1, 3))]
MORE_SCHEDULES = [*SCHEDULES, *({"schedule": "random", "seed": seed} for seed in range(3, 6))]
MARK = re.compile(r"# <- (blamed|waits)(?: \(ranks? ([\d, ]+)\))?$")

every_pair = pytest.mark.parametrize("name", NAMES)


class Finding(NamedTuple):
    """What a run came to: places are pairs of rank and line, line 0 being any line of another file."""

    error: type[BaseException] | None = None
    cause: type[BaseException] | None = None
    blamed: frozenset[tuple[int, int]] = frozenset()
    rows: frozenset[tuple[int, int]] = frozenset()
    message: str = ""


@functools.cache
def source(name: str) -> str:
    return (ZOO / f"{name}.py").read_text()


@functools.cache
def code(name: str) -> CodeType:
    return compile(source(name), str(ZOO / f"{name}.py"), "exec")


def load(name: str) -> ModuleType:
    """A fresh copy of a pair, so that no lock or queue of an earlier run is left in it."""
    module = ModuleType(f"zoo_{name}")
    module.__file__ = str(ZOO / f"{name}.py")
    exec(code(name), vars(module))
    return module


pair = functools.cache(load)


def in_row(row: str) -> list[str]:
    return [name for name in NAMES if getattr(pair(name), "ROW", None) == row]


def marked(name: str, kind: str) -> frozenset[tuple[int, int]]:
    """Rank and line of every mark of this kind."""
    module = pair(name)
    lines = enumerate(source(name).splitlines(), 1)
    others = [rank for rank in range(module.SIZE) if rank not in module.RANKS]
    implied = module.RANKS if kind == "blamed" else others
    return frozenset(
        (rank, line)
        for line, text in lines
        if (mark := MARK.search(text)) and mark[1] == kind
        for rank in (map(int, mark[2].split(",")) if mark[2] else implied)
    )


def run(name: str, program: str, schedule: dict, *, strict: bool) -> None:
    module = load(name)
    sys.modules[module.__name__] = module
    options = {"strict": strict, "stall_limit": 20.0, **getattr(module, "OPTIONS", {}), **schedule}
    arguments = getattr(module, "arguments", tuple)()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", FutureWarning)  # newer torch releases rename what trainers still call
            SimWorld(module.SIZE, **options).run(getattr(module, program), *arguments)
    finally:
        del sys.modules[module.__name__]


@functools.cache
def _finding(name: str, program: str, schedule: tuple, strict: bool) -> Finding:
    try:
        run(name, program, dict(schedule), strict=strict)
    except SimulationError as error:
        return found_in(error, str(ZOO / f"{name}.py"))
    except Warning as warning:
        return Finding(error=type(warning), message=str(warning))
    return Finding()


def found_in(error: SimulationError, file: str) -> Finding:
    def line(place) -> int:
        return place.line if place.file == file else 0

    report = error.report
    cause = type(error.__cause__) if error.__cause__ is not None else None
    if not isinstance(report, Report):
        return Finding(error=type(error), cause=cause, message=f"no report: {error}")
    rows = [*report.rows, *report.difference]
    return Finding(
        error=type(error),
        cause=cause,
        blamed=frozenset((culprit.rank, line(culprit.place)) for culprit in report.culprits),
        rows=frozenset((rank, line(row.place)) for row in rows for rank in row.ranks),
        message=str(error),
    )


def broken(name: str, schedule: dict = FIFO) -> Finding:
    return _finding(name, "broken", tuple(schedule.items()), False)


def mended(name: str, schedule: dict = FIFO) -> Finding:
    return _finding(name, "mended", tuple(schedule.items()), True)


def detected(name: str, schedule: dict = FIFO) -> bool:
    found, module = broken(name, schedule), pair(name)
    return found.error is module.EXPECTED and found.cause is getattr(module, "CAUSE", None)


def located(name: str, schedule: dict = FIFO) -> bool:
    return detected(name, schedule) and broken(name, schedule).blamed == marked(name, "blamed")


def check_broken(name: str, schedule: dict = FIFO) -> None:
    found, module = broken(name, schedule), pair(name)
    shown = f"{schedule}: {found.message}"
    assert found.error is module.EXPECTED, shown
    assert found.cause is getattr(module, "CAUSE", None), shown
    assert sorted({rank for rank, _ in found.blamed}) == list(module.RANKS), shown
    assert found.blamed == marked(name, "blamed"), shown
    assert found.rows >= marked(name, "waits"), shown
    assert [line for _, line in found.blamed if f"{name}.py:{line}" not in found.message] == [], shown
    assert getattr(module, "SAYS", "") in found.message


def check_mended(name: str, schedule: dict = FIFO) -> None:
    found = mended(name, schedule)
    assert found.error is None, f"{schedule}: {found.message}"


def check_pair(name: str, schedules: list[dict]) -> None:
    for schedule in schedules:
        check_broken(name, schedule)
        check_mended(name, schedule)


@every_pair
def test_a_broken_program_is_caught_and_its_line_is_blamed(name):
    check_broken(name)


@every_pair
def test_a_mended_program_runs_clean(name):
    check_mended(name)


@pytest.mark.slow
@every_pair
def test_a_pair_does_the_same_for_every_seed(name):
    check_pair(name, MORE_SCHEDULES if name in in_row("F10") else SCHEDULES)


@pytest.mark.parametrize("name", in_row("F09"))
def test_f09_collectives_of_trainers_interleaved_with_sends_of_rank_0_are_named(name):
    check_pair(name, SCHEDULES)


@pytest.mark.parametrize("name", in_row("F10"))
def test_f10_a_handshake_out_of_order_is_named(name):
    check_pair(name, SCHEDULES)


@pytest.mark.parametrize("name", in_row("F11"))
def test_f11_ranks_with_different_numbers_of_micro_batches_are_named(name):
    check_pair(name, SCHEDULES)


@every_pair
def test_a_pair_says_what_is_expected_of_it(name):
    module = pair(name)
    blamed = marked(name, "blamed")
    assert sorted(rank for rank, _ in blamed) == list(module.RANKS), "each rank to blame has one marked line"
    assert module.__doc__
    assert issubclass(module.EXPECTED, SimulationError)


@pytest.mark.slow  # one by one, they are in the tests above
def test_the_whole_zoo_scores_full_marks():
    assert len(NAMES) >= 40
    detection = sum(map(detected, NAMES)) / len(NAMES)
    line_accuracy = sum(map(located, NAMES)) / len(NAMES)
    false_alarms = sum(mended(name).error is not None for name in NAMES)
    assert (detection, line_accuracy, false_alarms) == (1.0, 1.0, 0)


def test_the_rows_of_the_table_of_failures_have_programs():
    assert min(len(in_row(row)) for row in ("F09", "F10", "F11")) >= 5
