"""Locks, threads and signals of a simulated process.

A thread that a rank starts becomes a task of that rank: it runs only when it holds the baton, sees the rank's process
state, and may call collectives. Locks hand the baton on where they would block, so a lock, queue or event that two
ranks wait for in a circle is seen as a deadlock at once.
"""

from __future__ import annotations

import _posixsubprocess
import _thread
import atexit
import concurrent.futures.thread as futures_thread
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import Any

import torch

from lightrft.sim import current
from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch
from lightrft.sim.places import Place, called_library_function, caller_place
from lightrft.sim.scheduler import Killed, Task

__all__ = ["RAW_LOCK", "RAW_RLOCK", "SimLock", "SimRLock", "join_leftover", "patches"]

host_cores: set[int] = set()
"""The cores on which the process may run: a rank is told these, and its child processes get them."""

_real_affinity: Any = getattr(os, "sched_getaffinity", None)
_new_lock = _thread.allocate_lock
RAW_LOCK: Any = type(_thread.allocate_lock())
RAW_RLOCK: Any = type(threading.RLock())


class LockWait:
    """What a task waits in that wants a lock, or a condition, event or queue built on one."""

    def __init__(self, lock: SimLock, place: Place, through: str) -> None:
        self._lock = lock
        self.place = place
        self._through = through or "Lock.acquire"

    @property
    def waits_for(self) -> int | None:
        """The rank that holds the lock."""
        holder = self._lock.holder
        return None if holder is None else holder.rank.index

    def describe(self) -> str:
        holder = self._lock.holder
        if self._through not in ("Lock.acquire", "RLock.acquire") or holder is None:
            return self._through
        return f"{self._through} (held by rank {holder.rank.index})"


class ImportWait:
    """What a task waits in that imports a module which another rank is executing."""

    def __init__(self, module: str, executing: int | None, place: Place) -> None:
        self._module = module
        self.waits_for = executing
        self.place = place

    def describe(self) -> str:
        by = "" if self.waits_for is None else f", which rank {self.waits_for} is executing for all ranks"
        return f"import of {self._module}{by}"


def _import_wait(task: Task) -> ImportWait | None:
    """The import that a lock is wanted for, if that is what it is wanted for."""
    frame = sys._getframe(3)
    if frame.f_code.co_filename != "<frozen importlib._bootstrap>" or frame.f_code.co_name != "acquire":
        return None
    lock = frame.f_locals["self"]
    executing = next((other.rank.index for other in task.scheduler.tasks if other.ident == lock.owner), None)
    return ImportWait(lock.name, executing, caller_place(4))


class JoinWait:
    """What a task waits in that joins a thread."""

    def __init__(self, name: str, place: Place) -> None:
        self._name = name
        self.place = place

    def describe(self) -> str:
        return f"Thread.join of {self._name}"


class SimLock:
    """A lock that hands the baton on instead of blocking the process; on other threads a plain lock."""

    __slots__ = ("__weakref__", "_real", "_waiters", "holder")

    def __init__(self, real: Any = None) -> None:
        self._real: Any = real if real is not None else _new_lock()
        self._waiters: deque[Task] = deque()
        self.holder: Task | None = None

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        """As :meth:`threading.Lock.acquire`; ``timeout`` in seconds of virtual time."""
        task = current_task()
        if self._real.acquire(False):
            self.holder = task
            return True
        if not blocking:
            return False
        if task is None:
            return bool(self._real.acquire(True, timeout))
        return self._wait(task, timeout)

    def _wait(self, task: Task, timeout: float) -> bool:
        scheduler = task.scheduler
        deadline = None if timeout < 0 else scheduler.now + round(timeout * 1e9)
        waiting = _import_wait(task) or LockWait(self, caller_place(3), called_library_function(3))
        while True:
            self._waiters.append(task)
            try:
                woken = scheduler.block(waiting, deadline)
            finally:
                if task in self._waiters:
                    self._waiters.remove(task)
            if self._real.acquire(False):
                self.holder = task
                return True
            if not woken:
                return False

    def release(self) -> None:
        """As :meth:`threading.Lock.release`."""
        self.holder = None
        self._real.release()
        if self._waiters:
            waiter = self._waiters.popleft()
            waiter.scheduler.wake(waiter)

    def locked(self) -> bool:
        """Whether anybody holds the lock."""
        return bool(self._real.locked())

    def _at_fork_reinit(self) -> None:
        self._real._at_fork_reinit()
        self._waiters.clear()

    __enter__ = acquire

    def __exit__(self, *exc: object) -> None:
        self.release()


class SimRLock(threading._RLock):  # type: ignore[misc] # final in the stubs only
    """A reentrant lock built on :class:`SimLock`."""

    def __init__(self) -> None:
        super().__init__()
        self._block = SimLock()


def _in_rank(simulated: Any) -> Any:
    """A factory that makes ``simulated`` objects on a rank's thread and the original ones elsewhere."""

    def make(original: Any) -> Any:
        def factory(*args: Any, **kwargs: Any) -> Any:
            return (simulated if current_task() is not None else original)(*args, **kwargs)

        factory.__name__ = getattr(original, "__name__", "factory")
        return factory

    return make


# -- threads ----------------------------------------------------------------------------------------------------------


def prepare_thread() -> None:
    """What every thread of a rank needs from torch.

    Hooks of autograd run on the thread that called backward; operations use as many threads as ``OMP_NUM_THREADS``
    says.
    """
    torch._C._set_multithreading_enabled(False)
    wanted = os.environ.get("OMP_NUM_THREADS", "1")
    torch.set_num_threads(int(wanted) if wanted.isdigit() and int(wanted) > 0 else 1)


def _spawn(function: Any, args: Any, kwargs: Any) -> tuple[Any, Task]:
    """A task for a thread that the running rank starts, and what the thread is to run."""
    parent = current_task()
    assert parent is not None
    thread = getattr(function, "__self__", None)
    name = str(getattr(thread, "name", "") or getattr(function, "__name__", "thread"))
    child = Task(parent.scheduler, parent.rank, name, daemon=getattr(thread, "daemon", True))
    if isinstance(thread, threading.Thread):
        child.thread = thread
        thread._lightrft_task = child  # type: ignore[attr-defined]

    def run() -> None:
        child.lock.acquire()
        current.bind(child)
        try:
            if not child.killed:
                prepare_thread()
                child.rank.adopt_groups()
                function(*args, **kwargs)
        except (Killed, ProcessExit):
            pass
        finally:
            child.rank.let_go()
            child.scheduler.finish(child)
            current.bind(None)

    return run, child


def _enlist(child: Task, ident: int) -> None:
    child.ident = ident
    child.rank.threads.append(child)
    child.scheduler.add(child)


def _start(original: Any) -> Any:
    def start_new_thread(function: Any, args: Any, kwargs: Any = None) -> Any:
        if current_task() is None:
            return original(function, args, kwargs or {})
        run, child = _spawn(function, args, kwargs or {})
        ident = original(run, ())
        _enlist(child, ident)
        return ident

    return start_new_thread


def _start_joinable(original: Any) -> Any:
    def start_joinable_thread(function: Any, **named: Any) -> Any:
        if current_task() is None:
            return original(function, **named)
        run, child = _spawn(function, (), {})
        handle = original(run, **named)
        _enlist(child, handle.ident)
        return handle

    return start_joinable_thread


def _join(original: Any) -> Any:
    def join(self: threading.Thread, timeout: float | None = None) -> None:
        task = current_task()
        target: Task | None = self.__dict__.get("_lightrft_task")
        if task is not None and target is not None and target is not task:
            wait_for_task(task, target, timeout, caller_place(2))
            if not target.finished:
                return
        original(self, timeout)

    return join


def wait_for_task(task: Task, target: Task, timeout: float | None, place: Place) -> None:
    """Block ``task`` until ``target`` has ended or ``timeout`` virtual seconds are over."""
    if target.finished:
        return
    scheduler = task.scheduler
    deadline = None if timeout is None or timeout < 0 else scheduler.now + round(timeout * 1e9)
    target.joiners.append(task)
    if not scheduler.block(JoinWait(target.name, place), deadline) and task in target.joiners:
        target.joiners.remove(task)


def join_leftover(task: Task) -> None:
    """End of a rank: wait for its threads as the end of a process does, and end those that it would abandon.

    Daemon threads and the idle workers of an executor are abandoned; every other thread is joined.
    """
    idle = {id(t.__dict__.get("_lightrft_task")) for t in list(futures_thread._threads_queues)}
    for child in task.rank.threads:
        if not child.finished and not child.daemon and id(child) not in idle:
            wait_for_task(task, child, None, caller_place())
    for child in task.rank.threads:
        if not child.finished:
            child.killed = True
            if child.waiting is not None:
                task.scheduler.wake(child)


def _excepthook(original: Any) -> Any:
    def excepthook(args: Any, /) -> Any:
        if not issubclass(args.exc_type, Killed):
            original(args)

    return excepthook


# -- signals, end of process ------------------------------------------------------------------------------------------


def _unraisablehook(original: Any) -> Any:
    def unraisablehook(unraisable: Any, /) -> None:
        task = current_task()
        if not isinstance(unraisable.exc_value, Killed) and not (task is not None and task.killed):
            original(unraisable)

    return unraisablehook


def _signal(original: Any) -> Any:
    def set_handler(signalnum: int, handler: Any) -> Any:
        task = current_task()
        if task is None:
            return original(signalnum, handler)
        handlers = task.rank.state.signals
        previous = handlers.get(signalnum, signal.getsignal(signalnum))
        handlers[signalnum] = handler
        return previous

    return set_handler


def _kill(original: Any) -> Any:
    def kill(pid: int, signalnum: int) -> None:
        task = current_task()
        if task is None or pid != os.getpid() or signalnum == 0:
            original(pid, signalnum)
            return
        handler = task.rank.state.signals.get(signalnum, signal.SIG_DFL)
        if callable(handler):
            handler(signalnum, None)
        elif handler != signal.SIG_IGN:
            raise ProcessExit(-signalnum)

    return kill


def _atexit_register(original: Any) -> Any:
    def register(function: Any, *args: Any, **kwargs: Any) -> Any:
        task = current_task()
        if task is None:
            return original(function, *args, **kwargs)
        task.rank.state.atexit.append((function, args, kwargs, caller_place(2)))
        return function

    return register


def _atexit_unregister(original: Any) -> Any:
    def unregister(function: Any) -> None:
        task = current_task()
        if task is not None:
            entries = task.rank.state.atexit
            entries[:] = [entry for entry in entries if entry[0] != function]
        original(function)

    return unregister


class ProcessExit(BaseException):
    """``os._exit`` on a rank's thread: ends the rank without its exit functions."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _exit(original: Any) -> Any:
    def exit_process(status: int) -> Any:
        if current_task() is None:
            original(status)
        raise ProcessExit(status)

    return exit_process


def _chdir(original: Any) -> Any:
    def chdir(path: Any) -> None:
        original(path)
        task = current_task()
        if task is not None:
            task.rank.state.cwd = os.getcwd()
            task.rank.world.switcher.any_chdir = True

    return chdir


def _fork_exec(original: Any) -> Any:
    def fork_exec(args: Any, executables: Any, close_fds: Any, pass_fds: Any, cwd: Any, env: Any, *rest: Any) -> Any:
        if env is None and current_task() is not None:  # C's environment is that of the whole process
            env = [key + b"=" + value for key, value in os.environb.items()]
        if current_task() is None or not host_cores:
            return original(args, executables, close_fds, pass_fds, cwd, env, *rest)
        pinned = _real_affinity(0)
        os.sched_setaffinity(0, host_cores)
        try:
            return original(args, executables, close_fds, pass_fds, cwd, env, *rest)
        finally:
            os.sched_setaffinity(0, pinned)

    return fork_exec


def _affinity(original: Any) -> Any:
    def sched_getaffinity(pid: int) -> Any:
        if pid == 0 and current_task() is not None:
            return set(host_cores)  # that all ranks share one core is the simulator's business
        return original(pid)

    return sched_getaffinity


def _leave_simulation_in_child() -> None:
    if current_task() is not None and host_cores:
        os.sched_setaffinity(0, host_cores)
    current.bind(None)


os.register_at_fork(after_in_child=_leave_simulation_in_child)


def _patches() -> list[Patch]:
    found = [
        Patch(threading, "Lock", _in_rank(SimLock)),
        Patch(threading, "RLock", _in_rank(SimRLock)),
        Patch(threading, "_allocate_lock", _in_rank(SimLock)),
        Patch(_thread, "allocate_lock", _in_rank(SimLock)),
        Patch(queue, "SimpleQueue", _in_rank(queue._PySimpleQueue)),  # type: ignore[attr-defined]
        Patch(futures_thread, "_global_shutdown_lock", SimLock),  # held while a worker starts, which is a switch
        Patch(threading, "excepthook", _excepthook),
        Patch(threading.Thread, "join", _join),
        Patch(_thread, "start_new_thread", _start),
        Patch(sys, "unraisablehook", _unraisablehook),
        Patch(signal, "signal", _signal),
        Patch(os, "kill", _kill),
        Patch(atexit, "register", _atexit_register),
        Patch(atexit, "unregister", _atexit_unregister),
        Patch(os, "chdir", _chdir),
        Patch(os, "_exit", _exit),
        Patch(subprocess, "_fork_exec", _fork_exec),
        Patch(_posixsubprocess, "fork_exec", _fork_exec),
    ]
    if _real_affinity is not None:
        found.append(Patch(os, "sched_getaffinity", _affinity))
    if hasattr(threading, "_start_new_thread"):
        found.append(Patch(threading, "_start_new_thread", _start))
    else:
        found.append(Patch(threading, "_start_joinable_thread", _start_joinable))
    return found


_PATCHES = _patches()


def patches() -> list[Patch]:
    """The replacements for locks, threads, signals and the end of a process."""
    return _PATCHES
