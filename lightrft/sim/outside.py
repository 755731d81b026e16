"""Waiting for the world outside: pipes, sockets, child processes, event loops.

A rank that waits for something real keeps the baton, because nobody can know what it waits for. Before it does, every
other task that can run is run, and while it waits virtual time passes as real time does. An event loop that watches
nothing but itself sleeps in virtual time.
"""

from __future__ import annotations

import fcntl
import functools
import os
import select
import selectors
import socket
import time
from asyncio import selector_events
from collections.abc import Callable
from multiprocessing import connection, popen_fork, synchronize
from typing import TYPE_CHECKING, Any

from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch
from lightrft.sim.places import Place, caller_place

if TYPE_CHECKING:
    from lightrft.sim.scheduler import Task

__all__ = ["patches", "wait_outside"]

_SLICE = 0.02
"""Seconds of real waiting after which other tasks are looked after again."""

_real_time, _real_sleep = time.monotonic, time.sleep


class LoopWait:
    """What a task waits in whose event loop has nothing to do."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def describe(self) -> str:
        return "the event loop"


def wait_outside(task: Task, look: Callable[[float], Any], timeout: float | None) -> Any:
    """Call ``look(seconds)`` until it finds something or ``timeout`` seconds are over; other tasks run meanwhile.

    Returns:
        what ``look`` found last; something false if the time is over.
    """
    scheduler = task.scheduler
    deadline = None if timeout is None else scheduler.now + round(max(timeout, 0) * 1e9)
    while True:
        found = look(0)
        if found or (deadline is not None and scheduler.now >= deadline):
            return found
        if scheduler.give_turn():
            continue
        left = _SLICE if deadline is None else min(_SLICE, (deadline - scheduler.now) / 1e9)
        start = _real_time()
        found = look(left)
        scheduler.pass_time(round((_real_time() - start) * 1e9))
        if found:
            return found
        scheduler.yield_now()


def _connection_wait(original: Any) -> Any:
    def wait(object_list: Any, timeout: float | None = None) -> Any:
        task = current_task()
        if task is None:
            return original(object_list, timeout)
        return wait_outside(task, lambda seconds: original(object_list, seconds), timeout)

    return wait


def _receive(original: Any) -> Any:
    def receive(self: Any, size: int, *args: Any, **kwargs: Any) -> Any:
        if size and current_task() is not None:
            connection.wait([self])
        return original(self, size, *args, **kwargs)

    return receive


def _popen_wait(original: Any) -> Any:
    def wait(self: Any, timeout: float | None = None) -> Any:
        if current_task() is not None and self.returncode is None and timeout != 0.0:
            connection.wait([self.sentinel], timeout)
            if timeout is not None:
                timeout = 0.0
        return original(self, timeout)

    return wait


def _flock(original: Any) -> Any:
    def flock(file: Any, operation: int) -> None:
        task = current_task()
        if task is None or operation & (fcntl.LOCK_NB | fcntl.LOCK_UN):
            original(file, operation)
            return

        def look(seconds: float) -> bool:
            try:
                original(file, operation | fcntl.LOCK_NB)
            except BlockingIOError:
                _real_sleep(seconds)
                return False
            return True

        wait_outside(task, look, None)

    return flock


def _semaphore_enter(original: Any) -> Any:
    def enter(self: Any) -> Any:
        return self.acquire() if current_task() is not None else original(self)

    return enter


def _semaphore_methods(original: Any) -> Any:
    def make_methods(self: Any) -> None:
        original(self)
        real = self._semlock.acquire

        def acquire(block: bool = True, timeout: float | None = None) -> Any:
            task = current_task()
            if task is None or not block:
                return real(block, timeout)
            return wait_outside(task, lambda seconds: real(seconds > 0, seconds), timeout)

        self.acquire = acquire

    return make_methods


def _select(original: Any) -> Any:
    def select_files(read: Any, write: Any, error: Any, timeout: float | None = None) -> Any:
        task = current_task()
        if task is None:
            return original(read, write, error, timeout)

        def look(seconds: float) -> Any:
            found = original(read, write, error, seconds)
            return found if any(found) else ()

        return wait_outside(task, look, timeout) or ([], [], [])

    return select_files


def _selector(original: Any) -> Any:
    def select_ready(self: Any, timeout: float | None = None) -> Any:
        task = current_task()
        if task is None or (timeout is not None and timeout <= 0):
            return original(self, timeout)
        if _watches_itself_only(self):
            return _idle_loop(task, self, lambda: original(self, 0), timeout)
        return wait_outside(task, lambda seconds: original(self, seconds), timeout)

    return select_ready


def _inherited_select(original: Any, _own: Any) -> Any:
    """Selectors inherit ``select``, so a patch of the class finds no original of its own."""
    return _selector(original)


def _watches_itself_only(selector: Any) -> bool:
    """Whether this is the selector of an event loop without any file but the one through which threads wake it."""
    keys = list(selector.get_map().values())
    if len(keys) != 1 or not isinstance(keys[0].data, tuple):
        return False
    return getattr(getattr(keys[0].data[0], "_callback", None), "__name__", "") == "_read_from_self"


_idle: dict[int, Task] = {}
"""Tasks whose event loop sleeps, by the identity of its selector."""


def _idle_loop(task: Task, selector: Any, look: Callable[[], Any], timeout: float | None) -> Any:
    """Only a thread of the rank, or time, can give this loop something to do."""
    found = look()
    if not found:
        scheduler = task.scheduler
        _idle[id(selector)] = task
        try:
            scheduler.block(
                LoopWait(caller_place(2)), None if timeout is None else scheduler.now + round(timeout * 1e9)
            )
        finally:
            del _idle[id(selector)]
        found = look()
    return found


def _write_to_self(original: Any) -> Any:
    def write_to_self(self: Any) -> None:
        original(self)
        task = _idle.get(id(self._selector))
        if task is not None and current_task() is not None:
            task.scheduler.wake(task)

    return write_to_self


def _waitpid(original: Any) -> Any:
    def waitpid(pid: int, options: int) -> Any:
        task = current_task()
        if task is None or options & os.WNOHANG or pid <= 0:
            return original(pid, options)
        descriptor = os.pidfd_open(pid)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        try:
            wait_outside(task, lambda seconds: poll.poll(seconds * 1000), None)
        finally:
            os.close(descriptor)
        return original(pid, options)

    return waitpid


def _socket_read(original_name: str) -> Callable[[Any], Any]:
    original = getattr(socket.socket, original_name)

    def make(_: Any) -> Any:
        def read(self: Any, *args: Any, **kwargs: Any) -> Any:
            task = current_task()
            timeout = self.gettimeout()
            if task is not None and timeout != 0:
                poll = select.poll()
                poll.register(self, select.POLLIN)
                if not wait_outside(task, lambda seconds: poll.poll(seconds * 1000), timeout):
                    raise TimeoutError("timed out")
            return original(self, *args, **kwargs)

        return read

    return make


def _patches() -> list[Patch]:
    found = [
        Patch(connection, "wait", _connection_wait),
        Patch(connection.Connection, "_recv", _receive),
        Patch(popen_fork.Popen, "wait", _popen_wait),
        Patch(select, "select", _select),
        Patch(fcntl, "flock", _flock),
        Patch(synchronize.SemLock, "__enter__", _semaphore_enter),
        Patch(synchronize.SemLock, "_make_methods", _semaphore_methods),
        Patch(selector_events.BaseSelectorEventLoop, "_write_to_self", _write_to_self),
    ]
    reads = ("recv", "recv_into", "recvfrom", "recvfrom_into", "recvmsg", "_accept")
    found += [Patch(socket.socket, name, _socket_read(name)) for name in reads]
    if hasattr(os, "pidfd_open"):
        found.append(Patch(os, "waitpid", _waitpid))
    for name in ("SelectSelector", "PollSelector", "EpollSelector", "KqueueSelector"):
        if hasattr(selectors, name):
            cls = getattr(selectors, name)
            found.append(Patch(cls, "select", functools.partial(_inherited_select, cls.select)))
    return found


_PATCHES = _patches()


def patches() -> list[Patch]:
    """The replacements for calls that wait for the world outside."""
    return _PATCHES
