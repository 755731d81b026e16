"""Seen from outside: a rank that holds the baton and is blocked in something real."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from lightrft.sim import divergence
from lightrft.sim.other_threads import frame_of_thread
from lightrft.sim.places import place_of_frame

if TYPE_CHECKING:
    from lightrft.sim.scheduler import Task
    from lightrft.sim.world import SimWorld

__all__ = ["StallWatcher"]

_LONG = 12
"""How many times ``stall_after`` a rank may compute before it is mentioned."""

_LAST_SECONDS = 2.0
"""How long ranks may go on without the simulator after the run has failed."""


class StallWatcher:
    """Looks from outside whether the rank that holds the baton is blocked in something real."""

    def __init__(self, world: SimWorld) -> None:
        self._world = world
        self.interval = max(0.05, min(0.5, world.stall_after / 4))
        self._switches = -1
        self._since = time.monotonic()
        self._cpu = 0.0
        self._said = False
        self._failed_since: float | None = None
        self._switched = time.monotonic()

    def look(self) -> None:
        """Called every ``interval`` seconds from the thread that waits for the run."""
        scheduler = self._world.scheduler
        task = scheduler.running
        if scheduler.drain_until is not None and not scheduler.closing:
            self._failed_since = self._failed_since or time.monotonic()
            if time.monotonic() - self._failed_since > _LAST_SECONDS:
                self._world.interrupt_failed_run()
        cpu = _cpu_seconds(task) if task is not None else 0.0
        now = time.monotonic()
        if (
            task is None
            or _is_debugged(task.ident)
            or scheduler.switches != self._switches
            or cpu - self._cpu > 0.1 * (now - self._since)
        ):
            self._note_long_computation(task, scheduler.switches, now)
            self._switches, self._since, self._cpu, self._said = scheduler.switches, now, cpu, False
            return
        stalled = now - self._since
        if stalled >= self._world.stall_after and not self._said:
            self._said = True
            sys.stderr.write(f"{divergence.stall_verdict(self._world, task, stalled)}\n")
            sys.stderr.flush()
        if stalled >= self._world.stall_limit:
            verdict = divergence.stall_verdict(self._world, task, stalled)
            task.killed = True
            raise verdict

    def _note_long_computation(self, task: Task | None, switches: int, now: float) -> None:
        """Say once in a while which rank computes without ever coming to the simulator: it may be a loop."""
        if switches != self._switches or task is None or _is_debugged(task.ident):
            self._switched = now
        elif now - self._switched > _LONG * self._world.stall_after:
            place = place_of_frame(frame_of_thread(task.ident))
            sys.stderr.write(
                f"rank {task.rank.index} has been computing for {now - self._switched:.0f} s at {place}; no other rank "
                "can run until it comes to a collective, a store, a lock, a sleep or a clock\n"
            )
            sys.stderr.flush()
            self._switched = now


def _is_debugged(ident: int) -> bool:
    """Whether the thread stands in a debugger: somebody is thinking."""
    frame = frame_of_thread(ident)
    while frame is not None:
        if frame.f_globals.get("__name__") == "bdb":
            return True
        frame = frame.f_back
    return False


def _cpu_seconds(task: Task) -> float:
    try:
        # Asked about a thread that has ended, the C library may crash. An unfinished one cannot end before the call.
        return 0.0 if task.finished else time.clock_gettime(time.pthread_getcpuclockid(task.ident))
    except OSError:  # the thread has just ended
        return 0.0
