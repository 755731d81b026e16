"""What went wrong in a process world: the error, with where every rank was."""

from __future__ import annotations

import os
import re
import signal
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from lightrft.errors import CollectiveTimeoutError, RankFailedError, SimulationError
from lightrft.sim.blame import outsiders
from lightrft.sim.divergence import Culprit, Report, Row, show_ranks
from lightrft.sim.places import UNKNOWN, Place, is_user_file
from lightrft.sim.process_errors import PackedError, unpack_error

if TYPE_CHECKING:
    from lightrft.sim.process_world import ProcessWorld

__all__ = ["RankEnd", "has_main_stack", "verdict"]

_MAIN_FUNCTION = "run_rank"
_MAIN_FILE = f"{os.sep}process_rank.py"
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*:$")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')
_WRAPPERS = ("wrapper", "_fn", "inner", "decorate_context", "_call_impl", "_wrapped_call_impl")


@dataclass(slots=True)
class RankEnd:
    """How far a rank came.

    Attributes:
        rank: global rank.
        ready: whether the function has been loaded.
        returned: whether the function has returned.
        error: what it raised.
        code: exit status, negative for a signal; None while the process lives.
        stacks: what faulthandler wrote of it.
    """

    rank: int
    ready: bool = False
    returned: bool = False
    error: PackedError | None = None
    code: int | None = None
    stacks: str = ""

    @property
    def gone(self) -> bool:
        """Whether the process has ended."""
        return self.code is not None

    @property
    def died(self) -> bool:
        """Whether the process ended where it should not."""
        return self.code is not None and self.error is None and not (self.returned and self.code == 0)

    @property
    def runs(self) -> bool:
        """Whether nothing is known of its end."""
        return not self.returned and self.error is None and self.code is None


class StackLine(NamedTuple):
    """One frame of a stack."""

    file: str
    line: int
    function: str


# -- stacks -----------------------------------------------------------------------------------------------------------


def main_stack(text: str) -> list[StackLine]:
    """The stack of the main thread, innermost first, without the lines of this package that called the function."""
    stack: list[StackLine] = []
    for section in _sections(text):
        stack = section
        if any(_is_ours(line) for line in section):
            break
    ours = next((n for n, line in enumerate(stack) if line.file.endswith(_MAIN_FILE)), len(stack))
    return stack[:ours]


def has_main_stack(text: str) -> bool:
    """Whether the main thread's stack has been written to its end."""
    return text.endswith("  ...\n") or any(section and section[-1].file == "<string>" for section in _sections(text))


def _is_ours(line: StackLine) -> bool:
    return line.function == _MAIN_FUNCTION and line.file.endswith(_MAIN_FILE)


def _sections(text: str) -> list[list[StackLine]]:
    sections: list[list[StackLine]] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            sections.append([])
        elif sections and (found := _FRAME.match(line)):
            sections[-1].append(StackLine(found[1], int(found[2]), found[3]))
    return sections


def _show(stack: Sequence[StackLine]) -> str:
    summaries = [traceback.FrameSummary(line.file, line.line, line.function) for line in reversed(stack)]
    return "".join(traceback.format_list(summaries)).rstrip()


def _whereabouts(stack: Sequence[StackLine]) -> tuple[Place, str]:
    """The user's line, and the library function that was called there."""
    user = next((n for n, line in enumerate(stack) if is_user_file(line.file)), None)
    if user is None:
        return (Place(*stack[-1]), "runs") if stack else (UNKNOWN, "does not answer")
    called = [line.function for line in stack[:user] if line.function not in _WRAPPERS]
    return Place(*stack[user]), f"is in {called[-1]}()" if called else "runs"


# -- rows -------------------------------------------------------------------------------------------------------------


def _state_of(end: RankEnd) -> tuple[Place, str]:
    if end.error is not None:
        return _place_of(end.error), f"raised {end.error.name}"
    if end.died:
        place, doing = _whereabouts(main_stack(end.stacks))
        known = place != UNKNOWN
        return place, _death_of(end) + (f", {doing.replace('is in', 'in')}" if known and doing != "runs" else "")
    if end.returned:
        place, doing = _whereabouts(main_stack(end.stacks))
        return (place, f"has returned, and {doing}") if place != UNKNOWN else (UNKNOWN, "has returned")
    return _whereabouts(main_stack(end.stacks))


def _place_of(error: PackedError) -> Place:
    lines = [Place(line.file, line.line, line.function) for line in error.frames]
    return next((line for line in reversed(lines) if is_user_file(line.file)), lines[-1] if lines else UNKNOWN)


def _death_of(end: RankEnd) -> str:
    code = end.code or 0
    if code < 0:
        try:
            how = f"died of {signal.Signals(-code).name}"
        except ValueError:
            how = f"died of signal {-code}"
    else:
        how = f"left with exit status {code}"
    return f"{how} after the function had returned" if end.returned else how


def _rows(states: Iterable[tuple[int, Place, str]]) -> tuple[Row, ...]:
    grouped: dict[tuple[Place, str], list[int]] = {}
    for rank, place, what in states:
        grouped.setdefault((place, what), []).append(rank)
    rows = [Row(tuple(ranks), place, what) for (place, what), ranks in grouped.items()]
    return tuple(sorted(rows, key=lambda row: (-len(row.ranks), row.ranks)))


def _texts(texts: Iterable[tuple[int, str]], heading: str = "{}:") -> list[str]:
    """Each text once, below the ranks that it is of."""
    by_text: dict[str, list[int]] = {}
    for rank, text in texts:
        if text:
            by_text.setdefault(text, []).append(rank)
    return [f"{heading.format(show_ranks(ranks))}\n{text}" for text, ranks in by_text.items()]


# -- verdicts ---------------------------------------------------------------------------------------------------------


def verdict(world: ProcessWorld, ends: Sequence[RankEnd], order: Sequence[int]) -> SimulationError:
    """The error that says why the run failed.

    Args:
        world: the world that ran.
        ends: how far each rank came, by rank.
        order: ranks that failed, in the order in which that was seen; empty if the time was over.
    """
    states = [(end.rank, *_state_of(end)) for end in ends]
    dead = [rank for rank in order if ends[rank].died]
    failed = dead or list(order)
    stacks = _texts(
        ((end.rank, _show(main_stack(end.stacks))) for end in ends if end.error is None),
        "stack of {} (most recent call last):",
    )
    if not failed:
        classes: dict[Place, list[int]] = {}
        for end, (rank, place, _) in zip(ends, states, strict=True):
            if place != UNKNOWN or end.runs:
                classes.setdefault(place, []).append(rank)
        report = _report(world, states, outsiders(classes))
        places = "; ".join(f"rank {culprit.rank} at {culprit.place}" for culprit in report.culprits[:6])
        head = f"timeout: the run did not end within {world.limit:g} s. Look at {places}."
        return CollectiveTimeoutError("\n\n".join([head, *stacks, str(report)]), report=report)
    report = _report(world, states, failed)
    first = ends[failed[0]]
    what = _death_of(first) if first.error is None else f"failed: {first.error.name}: {first.error.message}"
    raised = _texts((rank, error.text) for rank in order if (error := ends[rank].error) is not None)
    head = f"{show_ranks(rank for rank in failed if _kind(ends[rank]) == _kind(first))} {what}"
    failure = RankFailedError("\n\n".join([head, *raised, *stacks, str(report)]), report=report)
    if first.error is not None:
        failure.__cause__ = unpack_error(first.error)
    return failure


def _kind(end: RankEnd) -> object:
    return end.code if end.error is None else "raised"


def _report(world: ProcessWorld, states: Sequence[tuple[int, Place, str]], ranks: Iterable[int]) -> Report:
    chosen = set(ranks)
    culprits = tuple(Culprit(rank, place) for rank, place, _ in states if rank in chosen)
    return Report(_rows(states), culprits, (), "", world.seed, world.replay or repr(world))
