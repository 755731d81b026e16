"""Virtual time: inside a run ``time.sleep`` costs nothing and every clock shows the scheduler's time.

Reading a clock lets one microsecond pass, so that a loop which only watches the clock ends. Virtual time starts at a
fixed date: two runs of one seed see the same times.
"""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch
from lightrft.sim.places import Place, caller_place

__all__ = ["patches", "still_during_collection"]

EPOCH_NS = 1_767_225_600_000_000_000
"""Virtual time 0 as nanoseconds since 1970: the first second of 2026 (UTC)."""

TICK_NS = 1000

_collecting: list[str] = []
"""Not empty while garbage is collected."""


class Sleep:
    """What a sleeping task waits in."""

    def __init__(self, seconds: float, place: Place) -> None:
        self.seconds = seconds
        self.place = place

    def describe(self) -> str:
        return f"time.sleep({self.seconds:g})"


def _sleep(original: Any) -> Any:
    def sleep(seconds: float) -> None:
        task = current_task()
        if task is None:
            original(seconds)
            return
        if seconds < 0:
            raise ValueError("sleep length must be non-negative")
        scheduler = task.scheduler
        scheduler.block(Sleep(seconds, caller_place(2)), scheduler.now + round(seconds * 1e9))

    return sleep


def _reader(from_ns: Callable[[int], Any], epoch: int) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def read() -> Any:
            task = current_task()
            if task is None:
                return original()
            scheduler = task.scheduler
            if _collecting:
                return from_ns(epoch + scheduler.now)
            scheduler.now += TICK_NS
            scheduler.clock_reads += 1
            if not scheduler.clock_reads & 1023:  # it watches the clock: what it waits for may be up to somebody else
                scheduler.yield_now()
            return from_ns(epoch + scheduler.now)

        read.__name__ = original.__name__
        return read

    return make


@contextmanager
def still_during_collection() -> Iterator[None]:
    """Inside, no time passes while garbage is collected.

    When that happens is not up to the seed, and finalizers read clocks, as do callbacks such as the one of Hypothesis.
    """
    gc.callbacks.insert(0, _collection_starts)
    gc.callbacks.append(_collection_stops)
    try:
        yield
    finally:
        gc.callbacks.remove(_collection_starts)
        gc.callbacks.remove(_collection_stops)


def _collection_starts(phase: str, _: dict[str, int]) -> None:
    if phase == "start":
        _collecting.append(phase)


def _collection_stops(phase: str, _: dict[str, int]) -> None:
    if phase == "stop":
        _collecting.clear()


def _seconds(nanoseconds: int) -> float:
    return nanoseconds / 1e9


def _identity(nanoseconds: int) -> int:
    return nanoseconds


def _patches() -> list[Patch]:
    clocks = [
        Patch(time, name, _reader(convert, epoch))
        for stem, epoch in (("time", EPOCH_NS), ("monotonic", 0), ("perf_counter", 0))
        for name, convert in ((stem, _seconds), (f"{stem}_ns", _identity))
    ]
    # these two measure the rest of a timeout with a clock they imported by name
    inside = [Patch(queue, "time", _reader(_seconds, 0)), Patch(threading, "_time", _reader(_seconds, 0))]
    return [Patch(time, "sleep", _sleep), *clocks, *inside]


_PATCHES = _patches()


def patches() -> list[Patch]:
    """The replacements for the functions of :mod:`time`."""
    return _PATCHES
