"""Reports what was measured to pytest-benchmark, and writes the table of the documentation with ``--write``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch


class Replay:
    """A timer that shows seconds measured elsewhere.

    pytest-benchmark times a call from outside. Here time is taken inside the ranks, while the implementations take
    turns; each of its rounds "lasts" as long as one measurement did.
    """

    def __init__(self) -> None:
        self._seconds = 0.0

    def __call__(self) -> float:
        return self._seconds

    def report(self, benchmark: Any, seconds: Sequence[float]) -> None:
        """Make ``seconds`` the rounds of ``benchmark``."""
        remaining = iter(seconds)

        def advance() -> None:
            self._seconds += next(remaining)

        benchmark.pedantic(advance, rounds=len(seconds), iterations=1)


_replay = Replay()
Report = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write", action="store_true", help="write docs/benchmarks.md from this run")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_replay))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Torch computes on one thread, as it does on the threads of ranks and in the processes compared."""
    torch.set_num_threads(1)


@pytest.fixture
def report(benchmark: Any) -> Report:
    """``report(group, seconds, **extra)``: show measured seconds as the rounds of this test's benchmark."""

    def run(group: str, seconds: Sequence[float], **extra: Any) -> None:
        benchmark.group = group
        benchmark.extra_info.update(extra)
        _replay.report(benchmark, seconds)

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--write") and not session.config.option.collectonly:
        from benchmarks.table import write

        write()
