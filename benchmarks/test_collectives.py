"""Collectives on simulated ranks beside PyTorch's threaded group and real gloo processes: seconds of a call, a rank."""

from __future__ import annotations

import pytest

from benchmarks.measurements import compared, gloo
from benchmarks.operations import COMPARED, GLOO_RANKS, ONE_CORE_RANKS, OPERATIONS

CASES = [(name, ranks) for name, counts in COMPARED.items() for ranks in counts]


def seconds(microseconds: list[float]) -> list[float]:
    return [value * 1e-6 for value in microseconds]


@pytest.mark.parametrize("kind", ["simulated", "threaded"])
@pytest.mark.parametrize(("name", "ranks"), CASES)
def test_collective(report, name, ranks, kind):
    pair = compared(name, ranks)
    values = pair.ours if kind == "simulated" else pair.theirs
    report(f"{OPERATIONS[name].title}, {ranks} ranks", seconds(values), ratios=pair.ratios)


@pytest.mark.parametrize("ranks", ONE_CORE_RANKS)
def test_all_reduce_with_the_threaded_group_on_one_core(report, ranks):
    pair = compared("all_reduce", ranks, one_core=True)
    report(f"{OPERATIONS['all_reduce'].title}, {ranks} ranks", seconds(pair.theirs), ratios=pair.ratios)


@pytest.mark.parametrize("ranks", GLOO_RANKS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_collective_on_gloo_processes(report, name, ranks):
    report(f"{OPERATIONS[name].title}, gloo processes", seconds(gloo(ranks)[name]))
