"""Why a run cannot go on: who waits where for whom, and the first point at which ranks disagree.

Every verdict carries a :class:`Report`: the ranks grouped by place, those to blame, and the first difference between
their sequences of calls. The message of the error is the report as text.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightrft.errors import (
    BlockedOutsideError,
    CollectiveMismatchError,
    CollectiveTimeoutError,
    DeadlockError,
    RankFailedError,
    SimulationError,
    UnfinishedError,
)
from lightrft.sim.acceptance import advice
from lightrft.sim.blame import POINT_TO_POINT, cover, deadlock_suspects, odd_ranks, outsiders
from lightrft.sim.calls import Call, Group, Meeting, Signature
from lightrft.sim.other_threads import exceptions_of_threads, frame_of_thread
from lightrft.sim.places import UNKNOWN, Place, is_simulator_file, place_of_frame
from lightrft.sim.point_to_point import astray, other_tags
from lightrft.sim.scheduler import Killed

if TYPE_CHECKING:
    from lightrft.sim.rank import SimRank
    from lightrft.sim.scheduler import Task
    from lightrft.sim.world import SimWorld

__all__ = ["Culprit", "Report", "Row", "show_ranks", "verdict"]


@dataclass(frozen=True, slots=True)
class Row:
    """Ranks that are at one place, doing the same."""

    ranks: tuple[int, ...]
    place: Place
    what: str


@dataclass(frozen=True, slots=True)
class Culprit:
    """A rank that differs from the others, and the line at which it does."""

    rank: int
    place: Place


@dataclass(frozen=True, slots=True)
class Report:
    """What a failed run found.

    Attributes:
        rows: where every rank is, largest group first.
        culprits: ranks to blame, in rank order.
        difference: rows of the first call in which the members of a group differ; empty if there is none.
        difference_title: which call that is.
        seed: seed of the run.
        replay: how to run it again.
    """

    rows: tuple[Row, ...]
    culprits: tuple[Culprit, ...]
    difference: tuple[Row, ...]
    difference_title: str
    seed: int
    replay: str

    def __str__(self) -> str:
        parts = [_table(self.rows)]
        if self.difference:
            parts.append(f"{self.difference_title}:\n{_table(self.difference)}")
        parts.append(f"seed {self.seed}; run it again with: {self.replay}")
        return "\n\n".join(parts)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A disagreement that was seen when a rank came to a meeting."""

    title: str
    meeting: Meeting | None
    calls: tuple[tuple[int, Place, str], ...]
    culprits: tuple[Culprit, ...]
    creation: int | None = None


class CreationWait:
    """What a rank waits in that made another group than the others."""

    def __init__(self, members: Sequence[int], place: Place) -> None:
        self._members = members
        self.place = place

    def describe(self) -> str:
        return f"new_group({list(self._members)})"


# -- text -------------------------------------------------------------------------------------------------------------


def show_ranks(ranks: Iterable[int]) -> str:
    """``rank 3`` or ``ranks 0-2, 4-7``."""
    ordered = sorted(set(ranks))
    pieces: list[str] = []
    start = 0
    for position, rank in enumerate(ordered):
        if position + 1 == len(ordered) or ordered[position + 1] != rank + 1:
            first = ordered[start]
            pieces.append(str(rank) if first == rank else f"{first}-{rank}")
            start = position + 1
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(pieces)}"


def _table(rows: Sequence[Row]) -> str:
    heads = [show_ranks(row.ranks) for row in rows]
    width = min(max(map(len, heads), default=0), 30)
    lines = []
    for head, row in zip(heads, rows, strict=True):
        lines.append(f"  {head:<{width}}  {row.what}")
        if row.place != UNKNOWN:
            lines.append(f"  {'':<{width}}    at {row.place} in {row.place.function}")
        if row.place.source:
            lines.append(f"  {'':<{width}}    > {row.place.source}")
    return "\n".join(lines)


# -- where everybody is -----------------------------------------------------------------------------------------------


def _state_of(rank: SimRank, exceptions: Mapping[int, Any]) -> tuple[Place, str]:
    task = rank.blocked_task()
    if task is not None and task.waiting is not None:
        return task.waiting.place, f"waits in {task.waiting.describe()}{_exception_of(task, exceptions)}"
    if rank.main is None or not rank.main.finished:
        frame = frame_of_thread(task.ident if task is not None else -1)
        return place_of_frame(frame), "runs"
    call, what, place = rank.last
    if call is not rank.latest_call and rank.latest_call is not None:
        call = rank.latest_call
        return call.place, f"has returned; its last call was {call.describe()}"
    return place, f"has returned; it {what}"


def _exception_of(task: Task, exceptions: Mapping[int, Any]) -> str:
    """What the task was handling when it came to wait, which may be why it is there."""
    found = exceptions.get(task.ident)
    error = found[1] if isinstance(found, tuple) else found  # Python 3.11 gives type, value, traceback
    if error is None or isinstance(error, Killed):
        return ""
    return f", while handling {type(error).__name__}: {error}"


def _rows(states: Iterable[tuple[int, Place, str]]) -> tuple[Row, ...]:
    grouped: dict[tuple[Place, str], list[int]] = {}
    for rank, place, what in states:
        grouped.setdefault((place, what), []).append(rank)
    rows = [Row(tuple(ranks), place, what) for (place, what), ranks in grouped.items()]
    return tuple(sorted(rows, key=lambda row: (-len(row.ranks), row.ranks)))


def _whereabouts(world: SimWorld) -> list[tuple[int, Place, str]]:
    exceptions = exceptions_of_threads()
    return [(rank.index, *_state_of(rank, exceptions)) for rank in world.ranks]


# -- who is to blame --------------------------------------------------------------------------------------------------


def _culprits(ranks: Iterable[int], states: Iterable[tuple[int, Place, str]]) -> tuple[Culprit, ...]:
    chosen = set(ranks)
    return tuple(Culprit(rank, place) for rank, place, _ in sorted(states) if rank in chosen)


def _other_tags(world: SimWorld) -> Iterable[Culprit]:
    """Those that posted what a waiting rank may have meant, under another tag."""
    for rank in world.ranks:
        task = rank.blocked_task()
        if task is not None and isinstance(task.waiting, Call) and task.waiting.signature.operation in POINT_TO_POINT:
            for call in other_tags(task.waiting):
                yield Culprit(call.rank, call.place)


def _astray(world: SimWorld) -> Iterable[Culprit]:
    """The rank that sent to a wrong one, or named a wrong one to receive from; nobody if several seem to."""
    found = {Culprit(call.rank, call.place) for group in world.groups.values() for call in astray(group)}
    return found if len({culprit.rank for culprit in found}) == 1 else ()


def _by_rank(culprit: Culprit) -> tuple[int, Place]:
    return culprit.rank, culprit.place


def _outsiders(calls: Iterable[tuple[Any, int, Place]]) -> tuple[Culprit, ...]:
    """Those outside the largest class, with the places of their calls; an entry is (class, rank, place)."""
    classes: dict[Any, list[int]] = {}
    places: dict[int, Place] = {}
    for key, rank, place in calls:
        classes.setdefault(key, []).append(rank)
        places[rank] = place
    return tuple(Culprit(rank, places[rank]) for rank in sorted(outsiders(classes)))


def _first_difference(world: SimWorld, group: Group) -> tuple[str, tuple[Row, ...]]:
    """The first call of ``group`` in which its members differ, by signature or else by line."""
    sequences: dict[int, list[Call]] = {rank: [] for rank in group.ranks}
    for call in world._calls:
        if call.group is group and call.signature.operation not in POINT_TO_POINT:
            sequences[call.rank].append(call)
    longest = max(map(len, sequences.values()), default=0)
    for same, title in ((_same_signature, ""), (_same_line, " (the same operation, from different lines)")):
        for position in range(longest):
            calls = {rank: done[position] if position < len(done) else None for rank, done in sequences.items()}
            if not same(list(calls.values())):
                rows = [
                    (rank, call.place, call.signature.describe()) if call else (rank, UNKNOWN, "nothing")
                    for rank, call in calls.items()
                ]
                return f"the ranks of {group.title} differ first in call #{position + 1}{title}", _rows(rows)
    return "", ()


def _same_signature(calls: list[Call | None]) -> bool:
    first = calls[0]
    return first is not None and all(c is not None and c.signature == first.signature for c in calls)


def _same_line(calls: list[Call | None]) -> bool:
    first = calls[0]
    return first is not None and all(c is not None and c.place == first.place for c in calls)


def _waited_groups(world: SimWorld) -> list[Group]:
    found: dict[Group, None] = {}
    for rank in world.ranks:
        task = rank.blocked_task()
        if task is not None and isinstance(task.waiting, Call):
            found[task.waiting.group] = None
    return list(found)


# -- mismatches, as they are seen -------------------------------------------------------------------------------------


_FIELDS = ("operation", "dtype", "shape", "reduce operation", "root", "sizes", "device")


def _differing(left: Signature, right: Signature) -> str:
    names = [name for name, a, b in zip(_FIELDS, left, right, strict=True) if a != b]
    for alone in ("operation", "device"):
        if alone in names:
            return alone
    return " and ".join(names)


def _blame(calls: Sequence[Call], world: SimWorld) -> tuple[Culprit, ...]:
    """Who is to blame among the calls of a meeting: those whose tensors nobody can communicate, or else a minority."""
    elsewhere = tuple(Culprit(call.rank, call.place) for call in calls if call.signature.device is not None)
    if elsewhere:
        return elsewhere
    culprits = _outsiders((call.signature, call.rank, call.place) for call in calls)
    if len(culprits) == len(calls):  # no majority in this group: the other ranks tell who is odd
        odd = odd_ranks(world)
        return tuple(culprit for culprit in culprits if culprit.rank in odd) or culprits
    return culprits


def _shown(calls: Sequence[Call]) -> tuple[tuple[int, Place, str], ...]:
    """The calls of a meeting as rows of a table, with the device of every tensor if there is more than one."""
    signatures = [call.signature for call in calls]
    if any(signature.device is not None for signature in signatures):
        signatures = [signature._replace(device=signature.device or "cpu") for signature in signatures]
    pairs = zip(calls, signatures, strict=True)
    return tuple((call.rank, call.place, signature.describe()) for call, signature in pairs)


def call_mismatch(meeting: Meeting) -> Mismatch:
    """Members called different things with one sequence number."""
    return Mismatch("", meeting, (), ())


def sizes_mismatch(meeting: Meeting, problem: str, pairs: Sequence[tuple[int, int]]) -> Mismatch:
    """Members called the same, with sizes that do not fit together between the two ranks of each pair."""
    calls = [c for c in meeting.calls if c is not None]
    rows = tuple((c.rank, c.place, c.describe()) for c in calls)
    chosen = cover(pairs)
    return Mismatch(problem, None, rows, tuple(Culprit(c.rank, c.place) for c in calls if c.rank in chosen))


def message_mismatch(send: Call, receive: Call, problem: str) -> Mismatch:
    """A send met a receive that expects something else."""
    rows = tuple((c.rank, c.place, c.describe()) for c in (send, receive))
    ends = sorted((send, receive), key=lambda c: c.rank)
    chosen = [c for c in ends if c.signature.device is not None] or ends
    return Mismatch(problem, None, rows, tuple(Culprit(c.rank, c.place) for c in chosen))


def creation_mismatch(position: int) -> Mismatch:
    """Ranks made different groups as their n-th; :func:`verdict` looks who made what."""
    title = f"ranks made different groups as number {position + 1}: all ranks must make all groups in the same order"
    return Mismatch(title, None, (), (), position)


# -- verdicts ---------------------------------------------------------------------------------------------------------


def _replay(world: SimWorld) -> str:
    if world.replay:
        return world.replay
    return f"SimWorld({world.size}, seed={world.seed}, schedule={world.schedule!r})"


def _report(
    world: SimWorld,
    states: list[tuple[int, Place, str]],
    culprits: tuple[Culprit, ...],
    title: str = "",
    difference: tuple[Row, ...] = (),
) -> Report:
    return Report(_rows(states), culprits, difference, title, world.seed, _replay(world))


def _blame_line(culprits: tuple[Culprit, ...]) -> str:
    places: dict[Place, list[int]] = {}
    for culprit in culprits:
        places.setdefault(culprit.place, []).append(culprit.rank)
    shown = [
        f"{show_ranks(ranks)} at {place}" if place != UNKNOWN else show_ranks(ranks) for place, ranks in places.items()
    ]
    return "; ".join(shown[:6]) + (f"; ... ({len(shown)} places)" if len(shown) > 6 else "")


def verdict(
    world: SimWorld, failures: Sequence[tuple[SimRank, BaseException]], mismatch: Mismatch | None
) -> SimulationError:
    """The error that says why the run cannot go on."""
    states = _whereabouts(world)
    if mismatch is not None:
        return _mismatch_verdict(world, mismatch, states)
    if failures:
        return _failure_verdict(world, failures, states)
    suspects = {*_culprits(deadlock_suspects(world), states), *_other_tags(world), *_astray(world)}
    culprits = tuple(sorted(suspects, key=_by_rank))
    title = ""
    difference: tuple[Row, ...] = ()
    for group in _waited_groups(world):
        title, difference = _first_difference(world, group)
        if difference:
            break
    report = _report(world, states, culprits, title, difference)
    head = f"deadlock: no rank can go on. Look at {_blame_line(culprits)}."
    return DeadlockError(f"{head}\n\n{report}", report=report)


def _mismatch_verdict(world: SimWorld, mismatch: Mismatch, states: list[tuple[int, Place, str]]) -> SimulationError:
    title, culprits, rows = mismatch.title, mismatch.culprits, mismatch.calls
    heading = "they differ here"
    if mismatch.meeting is not None:
        calls = [call for call in mismatch.meeting.calls if call is not None]
        culprits = _blame(calls, world)
        signatures = list(dict.fromkeys(call.signature for call in calls))
        differing = _differing(signatures[0], signatures[1]) if len(signatures) > 1 else "operation"
        title = f"the {differing} differs between ranks"
        if differing == "device":
            device = next(signature.device for signature in signatures if signature.device is not None)
            title = f"{title}: some hand in a tensor on {device}, {advice(device)}"
        rows = _shown(calls)
        heading = f"call #{mismatch.meeting.sequence} on {calls[0].group.title}"
    if mismatch.creation is not None:
        made = world.made_at(mismatch.creation)
        culprits = _outsiders(((members, backend), rank, place) for rank, members, backend, place in made)
        rows = tuple((rank, place, f"new_group({list(members)}, {backend})") for rank, members, backend, place in made)
        heading = f"group number {mismatch.creation + 1}"
    report = _report(world, states, culprits, heading, _rows(rows))
    head = f"mismatch: {title}. Look at {_blame_line(culprits)}."
    return CollectiveMismatchError(f"{head}\n\n{report}", report=report)


def _failure_verdict(
    world: SimWorld, failures: Sequence[tuple[SimRank, BaseException]], states: list[tuple[int, Place, str]]
) -> SimulationError:
    culprits = []
    by_text: dict[str, list[int]] = {}
    for rank, error in failures:
        place = _place_of(error)
        culprits.append(Culprit(rank.index, place))
        states[rank.index] = (rank.index, place, f"raised {type(error).__name__}")
        text = "".join(traceback.format_exception(_without_simulator(error))).rstrip()
        by_text.setdefault(text, []).append(rank.index)
    report = _report(world, states, tuple(sorted(culprits, key=lambda c: c.rank)))
    first = failures[0][1]
    raised = "\n\n".join(f"{show_ranks(ranks)}:\n{text}" for text, ranks in by_text.items())
    head = f"{show_ranks(rank.index for rank, _ in failures)} failed: {type(first).__name__}: {_message(first)}"
    error = RankFailedError(f"{head}\n\n{raised}\n\n{report}", report=report)
    error.__cause__ = first
    return error


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a user's exception may fail to describe itself, with any error
        return "(its message cannot be shown)"


def _without_simulator(error: BaseException) -> BaseException:
    """Drop the simulator's own first frames from the traceback."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None and is_simulator_file(tb.tb_frame.f_code.co_filename):
        tb = error.__traceback__ = tb.tb_next
    return error


def _place_of(error: BaseException) -> Place:
    from lightrft.sim.places import is_user_file

    place, fallback = None, UNKNOWN
    tb = error.__traceback__
    while tb is not None:
        code = tb.tb_frame.f_code
        here = Place(code.co_filename, tb.tb_lineno, code.co_name)
        fallback = here
        if is_user_file(code.co_filename):
            place = here
        tb = tb.tb_next
    return place or fallback


def timeout_verdict(world: SimWorld, call: Call) -> SimulationError:
    """An operation has waited for longer than the timeout of its group."""
    states = _whereabouts(world)
    culprits = _culprits(_missing_from(call), states)
    waited = (world.scheduler.now - call.since) // 1_000_000
    limit = call.group.timeout // 1_000_000
    report = _report(world, states, culprits)
    head = (
        f"timeout: {call.describe()} waited for {waited} ms of virtual time, the timeout of the group is {limit} ms: "
        f"on a cluster the watchdog would end all ranks. Look at {_blame_line(culprits)}."
    )
    return CollectiveTimeoutError(f"{head}\n\n{report}", report=report)


def _missing_from(call: Call) -> set[int]:
    """The ranks that an operation waits for."""
    if call.signature.operation in POINT_TO_POINT:
        return {call.peer} if call.peer is not None and call.peer >= 0 else set(call.group.ranks) - {call.rank}
    meeting = call.group.meetings.get(call.sequence)
    come = {other.rank for other in meeting.calls if other is not None} if meeting is not None else {call.rank}
    return set(call.group.ranks) - come


def leftovers(world: SimWorld, found: Sequence[tuple[int, Place, str]]) -> UnfinishedError:
    """What a run that ended well left unfinished."""
    culprits = tuple(sorted({Culprit(rank, place) for rank, place, _ in found}, key=_by_rank))
    behind = min(len(rank.creations) for rank in world.ranks)
    made = [
        (rank, place, f"new_group({list(members)}, {backend})")
        for rank, members, backend, place in world.made_at(behind)
    ]
    report = _report(world, list(found), culprits, f"group number {behind + 1} was made by", _rows(made))
    head = f"the run ended, but something was left unfinished. Look at {_blame_line(culprits)}."
    return UnfinishedError(f"{head}\n\n{report}", report=report)


def stall_verdict(world: SimWorld, task: Task, seconds: float) -> BlockedOutsideError:
    """A rank has been blocked in something real for a while."""
    place = place_of_frame(frame_of_thread(task.ident))
    states = _whereabouts(world)
    states[task.rank.index] = (task.rank.index, place, "is blocked outside the simulator")
    report = _report(world, states, (Culprit(task.rank.index, place),))
    head = (
        f"rank {task.rank.index} has been blocked outside the simulator for {seconds:.0f} s at {place}: a socket, a "
        "subprocess, or a lock that no rank holds. No other rank can run meanwhile."
    )
    return BlockedOutsideError(f"{head}\n\n{report}", report=report)
