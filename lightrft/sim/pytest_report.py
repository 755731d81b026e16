"""How a failed test is shown: the lines of the user and the table of the simulator, not the simulator's own source."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import pytest

from lightrft.errors import LightRFTError, SimulationError, SimWarning

__all__ = ["remember", "show"]

_section = pytest.StashKey[tuple[str, str]]()


def remember(item: pytest.Item, title: str, text: str) -> None:
    """Have ``text`` shown below the failure that the test is about to end with."""
    item.stash[_section] = title, text


def show(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException], report: pytest.TestReport) -> None:
    """Rewrite the report of a failed test where the simulator has a part in it."""
    error = excinfo.value
    section = item.stash.get(_section, None)
    if isinstance(error, (LightRFTError, SimWarning, pytest.PytestReturnNotNoneWarning)):
        report.longrepr = _own_failure(item, excinfo)
    add_section = getattr(report.longrepr, "addsection", None)
    if section is not None and add_section is not None:
        add_section(*section)


def _own_failure(item: pytest.Item, excinfo: pytest.ExceptionInfo[BaseException]) -> Any:
    """The user's lines that led to an error of ours, and its message; the message alone if there are none."""
    error = excinfo.value
    tb, cause, context = error.__traceback__, error.__cause__, error.__context__
    error.__traceback__ = _lines_of_user(tb)
    error.__cause__ = None  # the message has it
    try:
        if error.__traceback__ is not None:
            shown: Any = item.repr_failure(pytest.ExceptionInfo.from_exception(error))
        else:
            shown = excinfo.getrepr(style="value", chain=False)
            _blame_culprit(shown.reprcrash, error)
    finally:
        error.__traceback__, error.__cause__, error.__context__ = tb, cause, context
    if getattr(shown, "reprcrash", None) is not None:
        shown.reprcrash.message = str(error)  # without the name of the class, the summary's one line says more
    return shown


def _lines_of_user(tb: TracebackType | None) -> TracebackType | None:
    """The traceback below pytest, down to the last line of the user's code, without any of the simulator's."""
    from lightrft.sim.places import is_simulator_file, is_user_file

    entries: list[TracebackType] = []
    while tb is not None:
        entries.append(tb)
        tb = tb.tb_next
        if entries[-1].tb_frame.f_globals.get("__name__", "").startswith(("_pytest.", "pluggy.")):
            entries.clear()
    files = [entry.tb_frame.f_code.co_filename for entry in entries]
    last = max((n for n, file in enumerate(files) if is_user_file(file)), default=-1)
    kept: TracebackType | None = None
    for file, entry in reversed(list(zip(files, entries, strict=True))[: last + 1]):
        if not is_simulator_file(file):
            kept = TracebackType(kept, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return kept


def _blame_culprit(crash: Any, error: BaseException) -> None:
    """Let the one-line form of a report name the line to blame instead of one of ours."""
    found = error.report if isinstance(error, SimulationError) else None
    culprits = getattr(found, "culprits", ())
    if culprits and crash is not None:
        crash.path, crash.lineno = culprits[0].place.file, culprits[0].place.line
