"""The processes of one engine: told when they die, and the only ones that its end takes with it."""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import multiprocessing.connection
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from lightrft.errors import EngineStateError

__all__ = ["EngineProcesses", "bury", "end_processes", "ignore_signal", "new_children"]

_KILLS_ALL = "kill_process_tree"
"""Function by which SGLang's engine ends its processes, in the module of its class."""

_BURIED: list[object] = []

_GRACE = 5.0
"""Seconds in which a process that has said it fails is expected to end; after them it counts as failed all the same."""


def ignore_signal(signum: int, frame: object) -> None:
    """Stands in for SGLang's handler while it starts: a child that fails must not kill this process.

    ``Engine`` itself sees that the child has ended, and raises.
    """


@contextmanager
def new_children(found: list[BaseProcess]) -> Iterator[None]:
    """Add to ``found`` what processes were started inside and still live at its end, also if it fails."""
    before = multiprocessing.active_children()
    try:
        yield
    finally:
        found += [child for child in multiprocessing.active_children() if child not in before]


class EngineProcesses:
    """The processes of an engine, which run beside this one.

    SGLang answers the death of one of them by killing this process and all its children. Instead, from here on, the
    call that is in progress raises, or else the next one.

    Args:
        engine: of SGLang, started.
        processes: those that it has started; none for an engine that needs none.
    """

    def __init__(self, engine: Any, processes: Sequence[BaseProcess]) -> None:
        self._engine = engine
        self._processes = list(processes)
        self._calls = 0
        self._died = ""
        self._handler_before: Any = None
        if not self._processes:
            return
        atexit.unregister(engine.shutdown)  # it would kill all children of this process, whoever started them
        atexit.register(self.end)
        if threading.current_thread() is threading.main_thread():  # in another one Python allows no handlers
            self._handler_before = signal.signal(signal.SIGQUIT, self._on_quit)

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of the engine goes on inside.

        Raises:
            EngineStateError: a process has died.
        """
        self._check()
        self._calls += 1
        try:
            yield
        except Exception:
            self._check()
            raise
        finally:
            self._calls -= 1
        self._check()

    @property
    def died(self) -> bool:
        """Whether one of them has died."""
        if not self._died:
            gone = [each for each in self._processes if not each.is_alive()]
            if gone:
                self._died = _story(_end_of(gone[0]))
        return bool(self._died)

    def end(self) -> None:
        """End the engine and its processes, and nothing else. A second call does nothing."""
        if self._engine is None:
            return
        engine, self._engine = self._engine, None
        if self.died:
            bury(engine)
        if not self._processes:
            engine.shutdown()
            return
        atexit.unregister(self.end)
        try:
            with _killing_only(engine, self._processes):
                engine.shutdown()
        finally:
            end_processes(self._processes)
            # Not before: until the engine is shut down, its watcher sends this signal.
            if self._handler_before is not None and signal.getsignal(signal.SIGQUIT) == self._on_quit:
                signal.signal(signal.SIGQUIT, self._handler_before)

    def _check(self) -> None:
        if self.died:
            raise EngineStateError(self._died)

    def _on_quit(self, signum: int, frame: FrameType | None) -> None:
        """A child says that it fails, SGLang's watcher says that one has ended, or somebody else sends the signal."""
        if self._died:
            return
        multiprocessing.connection.wait([each.sentinel for each in self._processes], timeout=_GRACE)
        if not self.died:
            if callable(self._handler_before):
                self._handler_before(signum, frame)  # that of another engine, perhaps
                return
            self._died = _story("a process of SGLang has said that it fails (SIGQUIT)")
        if self._calls:
            self._engine.loop.stop()  # the call would wait for ever; what a handler raises, the loop would swallow


def bury(remains: object) -> None:
    """Keep what is left of an engine whose processes did not read all that was sent to them.

    When its sockets are collected as garbage they wait for a reader, for ever.
    """
    _BURIED.append(remains)


def end_processes(processes: Sequence[BaseProcess]) -> None:
    """Kill ``processes`` and their children, and wait until they are gone."""
    psutil = importlib.import_module("psutil")  # SGLang needs it, and so brings it
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(process.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        process.kill()
    for process in processes:
        process.join()


def _end_of(process: BaseProcess) -> str:
    code = process.exitcode
    end = f"by signal {-code}" if code is not None and code < 0 else f"with exit code {code}"
    return f"{process.name} of SGLang (pid {process.pid}) has ended {end}"


def _story(what: str) -> str:
    return f"{what}: its output says why. Nothing can be generated any more; shut the engine down and set up a new one"


@contextmanager
def _killing_only(engine: Any, processes: Sequence[BaseProcess]) -> Iterator[None]:
    """``engine.shutdown()`` kills these processes where it would kill all children of this one."""
    module = sys.modules[type(engine).__module__]
    kills_all = getattr(module, _KILLS_ALL, None)
    if kills_all is None:
        yield
        return
    setattr(module, _KILLS_ALL, lambda *args, **kwargs: end_processes(processes))  # noqa: ARG005 - takes what it may
    try:
        yield
    finally:
        setattr(module, _KILLS_ALL, kills_all)
