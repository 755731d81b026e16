"""What a run did: collectives, messages, bytes and time, by group and by line of the user's code."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from lightrft.sim.exchanges import Exchange, exchanges
from lightrft.sim.places import UNKNOWN, Place

if TYPE_CHECKING:
    from lightrft.sim.calls import Call, Group, Wait
    from lightrft.sim.world import SimWorld

__all__ = ["GroupUse", "LineUse", "RunReport", "Usage", "make_report"]

_SHOWN_GROUPS, _SHOWN_LINES = 5, 10


OwnTimes = Mapping[tuple[Place, str], int] | None


class Usage(NamedTuple):
    """What a run took, as far as its calls do not say it; times in nanoseconds."""

    real: int = 0
    virtual: int = 0
    switches: int = 0
    own: OwnTimes = None
    """Real time in the code of the ranks on the way to calls, by line and operation; None if it was not measured."""
    own_at_end: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupUse:
    """What was done on a group, or on all groups of one description and size: the groups of one dimension of a mesh.

    Attributes:
        name: how the report names it.
        collectives: how many there were.
        messages: how many there were.
        payload: bytes, added up over all of them.
    """

    name: str
    collectives: int
    messages: int
    payload: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LineUse:
    """What one line of the user's code did, with one operation.

    Attributes:
        place: the line.
        operation: name of the call.
        count: collectives, each at the line of the lowest rank that takes part; or sends; or receives.
        payload: bytes, added up over all of them.
        own_seconds: real time that ranks spent in their own code on the way to this line, since their last call; None
            if it was not measured.
        waited_seconds: virtual time that ranks spent waiting in these calls, added up over the ranks.
    """

    place: Place
    operation: str
    count: int
    payload: int
    own_seconds: float | None
    waited_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """What a run did. As text: a summary, then the groups and the lines with the largest payload.

    Attributes:
        ranks: size of the world.
        collectives: how many there were; each counts once, however many ranks take part.
        messages: how many there were; a send and its receive are one message.
        unfinished: how many of both never completed.
        payload: bytes, added up over all of them.
        groups: by group, largest payload first.
        lines: by line and operation, largest payload first.
        real_seconds: real time between the start of the first rank and the end of the last.
        own_seconds: the part of it in which ranks ran their own code, with all libraries that it calls; None if it was
            not measured.
        virtual_seconds: virtual time at the end of the run.
        switches: how often one rank handed the baton to another.
    """

    ranks: int
    collectives: int
    messages: int
    unfinished: int
    payload: int
    groups: tuple[GroupUse, ...]
    lines: tuple[LineUse, ...]
    real_seconds: float
    own_seconds: float | None
    virtual_seconds: float
    switches: int

    @property
    def simulator_seconds(self) -> float | None:
        """The other part, spent in the simulator: collectives, messages, switches of ranks."""
        return None if self.own_seconds is None else max(0.0, self.real_seconds - self.own_seconds)

    @property
    def waited_seconds(self) -> float:
        """Virtual time that ranks spent waiting in calls, added up over the ranks."""
        return sum(line.waited_seconds for line in self.lines)

    def __str__(self) -> str:
        parts = ["\n".join([_summary(self), *_times(self)])]
        if self.lines:
            parts += [_table(_group_rows(self.groups)), _table(_line_rows(self))]
        return "\n\n".join(parts)


# -- from the calls of a run ------------------------------------------------------------------------------------------


def make_report(world: SimWorld) -> RunReport:
    """The report of the latest run of ``world``."""
    every, usage = exchanges(world._calls), world._usage
    messages = sum(exchange.is_message for exchange in every)
    own = None if usage.own is None else (sum(usage.own.values()) + usage.own_at_end) / 1e9
    return RunReport(
        ranks=world.size,
        collectives=len(every) - messages,
        messages=messages,
        unfinished=sum(not exchange.complete for exchange in every),
        payload=sum(exchange.payload for exchange in every),
        groups=_group_uses(every, world.groups.values()),
        lines=_line_uses(every, world._waits, usage.own, world.virtual_time),
        real_seconds=usage.real / 1e9,
        own_seconds=own,
        virtual_seconds=world.virtual_time / 1e9,
        switches=usage.switches,
    )


def _group_uses(every: Sequence[Exchange], groups: Iterable[Group]) -> tuple[GroupUse, ...]:
    alike: dict[Any, list[Group]] = defaultdict(list)
    for group in groups:
        alike[_likeness(group)].append(group)
    counts: dict[Any, list[int]] = defaultdict(lambda: [0, 0, 0])
    for exchange in every:
        count = counts[_likeness(exchange.calls[0].group)]
        count[exchange.is_message] += 1
        count[2] += exchange.payload
    uses = [
        GroupUse(name=_group_name(alike[key]), collectives=collectives, messages=messages, payload=size)
        for key, (collectives, messages, size) in counts.items()
    ]
    return tuple(sorted(uses, key=lambda use: (-use.payload, -use.collectives - use.messages, use.name)))


def _likeness(group: Group) -> Any:
    """What groups have in common that stand in one row: the dimension of a mesh, or the description the user gave."""
    if group.description in ("", "undefined"):
        return group
    return group.description, group.size


def _group_name(groups: Sequence[Group]) -> str:
    if len(groups) == 1 or groups[0].description == "default_pg":
        return groups[0].title
    size = groups[0].size
    return f"{len(groups)} groups {groups[0].description!r} of {size} rank{'s' if size > 1 else ''}"


def _line_uses(every: Sequence[Exchange], waits: Sequence[Wait], own: OwnTimes, now: int) -> tuple[LineUse, ...]:
    lines: dict[tuple[Place, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    with_wait = {wait.call for wait in waits}
    for exchange in every:
        lowest, size = min(call.rank for call in exchange.calls), exchange.payload
        end = exchange.calls[-1].since if exchange.complete else now
        for call in exchange.calls:
            line = lines[_line(call)]
            if exchange.is_message or call.rank == lowest:
                line[0] += 1
                line[1] += size
            if call.blocks and call not in with_wait:
                line[2] += end - call.since
    for wait in waits:
        lines[_line(wait.call)][2] += (wait.until if wait.until >= 0 else now) - wait.since
    uses = [
        LineUse(
            place=key[0],
            operation=key[1],
            count=count,
            payload=size,
            own_seconds=None if own is None else own.get(key, 0) / 1e9,
            waited_seconds=waited / 1e9,
        )
        for key, (count, size, waited) in lines.items()
    ]
    return tuple(sorted(uses, key=lambda use: (-use.payload, -use.count, use.place, use.operation)))


def _line(call: Call) -> tuple[Place, str]:
    return call.place, call.signature.operation


# -- text -------------------------------------------------------------------------------------------------------------


def _summary(report: RunReport) -> str:
    parts = [_count(report.ranks, "rank"), _count(report.collectives, "collective"), _count(report.messages, "message")]
    text = f"{', '.join(parts)}, payload {format_bytes(report.payload)}"
    return f"{text}; {report.unfinished:,} of them never completed" if report.unfinished else text


def _times(report: RunReport) -> list[str]:
    real, own, simulator = report.real_seconds, report.own_seconds, report.simulator_seconds
    lines = [f"real time {format_seconds(real)}, {_count(report.switches, 'switch', 'switches')} of ranks"]
    if own is not None and simulator is not None:
        lines[0] += f": {_share(own, real)} in the code of the ranks, {_share(simulator, real)} in the simulator"
    if report.virtual_seconds:
        waited = _share(report.waited_seconds, report.ranks * report.virtual_seconds)
        lines.append(f"virtual time {format_seconds(report.virtual_seconds)}: ranks waited in calls for {waited} of it")
    return lines


def _group_rows(groups: Sequence[GroupUse]) -> list[list[str]]:
    rows = [["group", "collectives", "messages", "payload"]]
    rows += [
        [use.name, f"{use.collectives:,}", f"{use.messages:,}", format_bytes(use.payload)]
        for use in groups[:_SHOWN_GROUPS]
    ]
    return _with_rest(rows, len(groups) - _SHOWN_GROUPS, "group")


def _line_rows(report: RunReport) -> list[list[str]]:
    timed, waits = report.own_seconds is not None, report.waited_seconds > 0
    rows = [["line", "operation", "count", "payload", *["code before"] * timed, *["virtual wait"] * waits]]
    for use in report.lines[:_SHOWN_LINES]:
        row = [_place(use.place), use.operation, f"{use.count:,}", format_bytes(use.payload)]
        if use.own_seconds is not None:
            row.append(format_seconds(use.own_seconds))
        if waits:
            row.append(_share(use.waited_seconds, report.ranks * report.virtual_seconds))
        rows.append(row)
    return _with_rest(rows, len(report.lines) - _SHOWN_LINES, "line")


def _with_rest(rows: list[list[str]], rest: int, what: str) -> list[list[str]]:
    return [*rows, [f"and {rest:,} more {what}{'s' if rest > 1 else ''}"]] if rest > 0 else rows


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in columns: texts to the left, numbers to the right. The last row may have one cell, of any width."""
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(len(row[column]) for row in full) for column in range(len(rows[0]))]
    texts = 1 if len(widths) == 4 else 2
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < texts else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _place(place: Place) -> str:
    """``train.py:45``; of a long name its end."""
    if place is UNKNOWN:
        return "(no line of yours)"
    text = str(place)
    return text if len(text) <= 44 else f"...{text[-41:]}"


def _count(number: int, what: str, several: str = "") -> str:
    return f"{number:,} {what if number == 1 else several or f'{what}s'}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "0 %"


def format_bytes(number: int) -> str:
    """``512 B``, ``1.5 KiB``, ``20.0 GiB``."""
    if number < 1024:
        return f"{number} B"
    size, unit = number / 1024, 0
    units = ("KiB", "MiB", "GiB", "TiB", "PiB")
    while size >= 1024 and unit + 1 < len(units):
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {units[unit]}"


def format_seconds(seconds: float) -> str:
    """``830 us``, ``12.5 ms``, ``1.20 s``."""
    if seconds < 0.001:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:,.2f} s"
