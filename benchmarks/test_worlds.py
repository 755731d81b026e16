"""Whole worlds: start and end, memory, a deadlock's report, many in a row; and the parts of one collective."""

from __future__ import annotations

import pytest

from benchmarks.measurements import DEADLOCKS, deadlock, many_worlds, parts, start_and_end


@pytest.mark.parametrize("world", ["first", "later"])
@pytest.mark.parametrize("kind", ["simulated", "threaded"])
def test_1024_ranks_start_meet_and_end(report, kind, world):
    measured = start_and_end(kind)
    report("1024 ranks start, meet and end", measured[world], mib_per_rank=measured["mib_per_rank"])


@pytest.mark.parametrize("kind", DEADLOCKS)
def test_a_deadlock_of_1024_ranks_is_reported(report, kind):
    report("a deadlock of 1024 ranks is reported", deadlock(kind))


def test_a_thousand_worlds(report):
    measured = many_worlds()
    report("one of 1,000 worlds of 4 ranks", [measured["seconds"]], left=measured)


@pytest.mark.parametrize("part", ["**one switch of ranks**", "**one all_reduce of 16 floats**"])
def test_what_a_collective_consists_of(report, part):
    report("8 ranks: one switch, one all_reduce", [value * 1e-6 for value in parts()[part]], parts=parts())
