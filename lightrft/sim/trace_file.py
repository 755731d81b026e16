"""A run as a trace in the Trace Event Format, which Perfetto and ``chrome://tracing`` show.

Virtual time stands still while ranks work, so the time axis is virtual time plus one microsecond for each call, and
each wait for a handle, that any rank has begun before: nothing is measured, and one seed gives one file.

A call that blocks is a slice from the call to the moment at which the last member has come. A call that returns a
handle is a slice of one microsecond, and ``wait()`` another one; an asynchronous slice spans from the call to the end
of the wait that delivers its result. If nothing else happened between the two, they are one slice.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from lightrft.sim.calls import Call, Wait, format_shape, short_dtype
from lightrft.sim.exchanges import exchanges, payload
from lightrft.sim.places import UNKNOWN

if TYPE_CHECKING:
    from lightrft.sim.world import SimWorld

__all__ = ["write"]

TICK_NS = 1000
"""What a call or a wait adds to the time axis."""

_FIRST_PID = 10_000
_THREAD_STEP = 1_000_000
_AXIS = "virtual time plus 1 us for each call or wait that any rank has begun before"

TraceEvent = dict[str, Any]


def write(world: SimWorld, path: str) -> None:
    """Write the latest run of ``world``, which may have failed, or may never have begun, to the file ``path``.

    Raises:
        OSError: the file cannot be written.
    """
    head = {
        "displayTimeUnit": "ns",
        "otherData": {"axis": _AXIS, "ranks": world.size, "seed": world.seed, "schedule": world.schedule},
    }
    timeline = _Timeline(world)
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
        lines = (json.dumps(event, separators=(",", ":")) for event in chain(timeline.rows(), timeline.events()))
        file.write(next(lines))
        file.writelines(f",\n{line}" for line in lines)
        file.write("\n]}\n")


class _Timeline:
    """Where the calls and waits of a run lie on the time axis."""

    def __init__(self, world: SimWorld) -> None:
        self._size = world.size
        self._calls, self._waits = world._calls, world._waits
        self._positions = _positions(self._calls, self._waits)
        self._end = world.virtual_time + TICK_NS * len(self._positions)
        self._completed: dict[Call, int] = {}
        self._numbers: dict[Any, int] = {}
        self._sends = {(call.group, call.match): call for call in self._calls if call.signature.operation == "send"}
        for exchange in exchanges(self._calls):
            if exchange.complete:
                last = exchange.calls[-1]
                self._completed.update(dict.fromkeys(exchange.calls, self._at(last) + TICK_NS))
        self._waits_of: dict[Call, list[Wait]] = defaultdict(list)
        for wait in self._waits:
            self._waits_of[wait.call].append(wait)
        self._tids = self._threads()

    def _at(self, what: Call | Wait) -> int:
        return what.since + TICK_NS * self._positions[what]

    def _threads(self) -> dict[tuple[int, int], int]:
        """Thread ids, by rank and number of the task; the main task of a rank has its process id."""
        tids = {(rank, rank): _FIRST_PID + rank for rank in range(self._size)}
        counts: dict[int, int] = defaultdict(int)
        for what in self._positions:
            rank = _call_of(what).rank
            if (rank, what.thread) not in tids:
                counts[rank] += 1
                tids[rank, what.thread] = _FIRST_PID + rank + counts[rank] * _THREAD_STEP
        return tids

    # -- what the file holds ------------------------------------------------------------------------------------

    def rows(self) -> Iterator[TraceEvent]:
        """Names and order of the rows."""
        for (rank, _), tid in self._tids.items():
            row = {"ph": "M", "pid": _FIRST_PID + rank, "tid": tid}
            number = tid // _THREAD_STEP
            if not number:
                yield {**row, "name": "process_name", "args": {"name": f"rank {rank}"}}
                yield {**row, "name": "process_sort_index", "args": {"sort_index": rank}}
            yield {**row, "name": "thread_name", "args": {"name": f"thread {number}" if number else f"rank {rank}"}}
            yield {**row, "name": "thread_sort_index", "args": {"sort_index": number}}

    def events(self) -> Iterator[TraceEvent]:
        """Slices in the order in which they begin, each followed by the marks that belong to it."""
        for what in self._positions:
            yield from self._of_wait(what) if isinstance(what, Wait) else self._of_call(what)

    def _of_call(self, call: Call) -> Iterator[TraceEvent]:
        start, name = self._at(call), call.signature.operation
        if call.blocks and not self._waits_of[call]:
            yield self._slice(call, name, call.thread, start, self._completed.get(call))
        elif self._is_one_slice(call):
            wait = self._waits_of[call][0]
            yield self._slice(call, name, call.thread, start, self._end_of(wait))
            yield from self._arrow(call, wait, start)
        else:
            yield self._slice(call, name, call.thread, start, start + TICK_NS)
            yield from self._flight(call, start)

    def _of_wait(self, wait: Wait) -> Iterator[TraceEvent]:
        call, start = wait.call, self._at(wait)
        if not self._is_one_slice(call):
            yield self._slice(call, f"wait {call.signature.operation}", wait.thread, start, self._end_of(wait))
            yield from self._arrow(call, wait, start)

    def _is_one_slice(self, call: Call) -> bool:
        """Whether the rank waited as soon as it had made the call, with nothing in between."""
        waits = self._waits_of[call]
        if len(waits) != 1:
            return False
        wait = waits[0]
        return (wait.before, wait.thread, wait.since) == (self._positions[call] + 1, call.thread, call.since)

    def _end_of(self, wait: Wait) -> int | None:
        return None if wait.until < 0 else wait.until + TICK_NS * wait.after

    def _slice(self, call: Call, name: str, thread: int, start: int, end: int | None) -> TraceEvent:
        """A slice of a row; one that never ended reaches to the end of the run."""
        if end is None:
            name, end = f"{name} (never returned)", self._end
        event = self._mark("X", call, thread, start, name, "message" if call.peer is not None else "collective")
        return {**event, "dur": (end - start) / 1000, "args": _arguments(call)}

    def _flight(self, call: Call, start: int) -> Iterator[TraceEvent]:
        """From the call to the end of the wait that delivered its result."""
        end = self._end_of(self._waits_of[call][-1]) if call.done else None
        for phase, time in (("b", start), ("e", self._end if end is None else end)):
            mark = self._mark(phase, call, call.thread, time, call.signature.operation, "asynchronous")
            yield {**mark, "id": self._number(call)}

    def _arrow(self, call: Call, wait: Wait, start: int) -> Iterator[TraceEvent]:
        """From the slice of a send to the slice, begun at ``start``, in which its message is received."""
        if call.signature.operation != "recv" or not call.done or wait is not self._waits_of[call][-1]:
            return
        send = self._sends[call.group, call.match]
        sent = self._at(send)
        number = self._number(send.group, send.match)
        yield {**self._mark("s", send, send.thread, sent, "message", "message"), "id": number}
        mark = self._mark("f", call, wait.thread, max(sent, start), "message", "message")
        yield {**mark, "id": number, "bp": "e"}

    def _number(self, *key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers) + 1)

    def _mark(self, phase: str, call: Call, thread: int, time: int, name: str, category: str) -> TraceEvent:
        row = {"pid": _FIRST_PID + call.rank, "tid": self._tids[call.rank, thread]}
        return {"ph": phase, "name": name, "cat": category, "ts": time / 1000, **row}


def _positions(calls: Sequence[Call], waits: Sequence[Wait]) -> dict[Call | Wait, int]:
    """Calls and waits in the order in which they began, with their numbers in it."""
    order: dict[Call | Wait, int] = {}
    calls_left = iter(calls)
    for wait in waits:
        while len(order) < wait.before:
            order[next(calls_left)] = len(order)
        order[wait] = len(order)
    for call in calls_left:
        order[call] = len(order)
    return order


def _call_of(what: Call | Wait) -> Call:
    return what.call if isinstance(what, Wait) else what


def _arguments(call: Call) -> dict[str, Any]:
    signature, place = call.signature, call.place
    return {
        "call": call.describe(),
        "group": call.group.title,
        "sequence": call.sequence,
        "shape": format_shape(signature.shape),
        "dtype": "" if signature.dtype is None else short_dtype(signature.dtype),
        "bytes": payload(call),
        "line": "" if place is UNKNOWN else f"{place} in {place.function}",
        "virtual time of the call (us)": call.since / 1000,
    }
