"""What a start of SGLang changes in the process that starts it, put back afterwards."""

from __future__ import annotations

import asyncio
import gc
import logging
import multiprocessing
import os
import resource
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from lightrft.strategy.utils.random_state import capture_random_state, restore_random_state

__all__ = ["put_back", "set_aside"]

_SIGNALS = (signal.SIGQUIT, signal.SIGTERM, signal.SIGINT)
_LIMITS = (resource.RLIMIT_STACK, resource.RLIMIT_NOFILE)


@contextmanager
def put_back() -> Iterator[None]:
    """Inside, anything may be changed of what is listed in ``_PARTS``; afterwards it is as it was."""
    with ExitStack() as stack:
        for part in _PARTS:
            stack.callback(part())
        yield


@contextmanager
def set_aside(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Environment variables have other values inside; ``None`` takes one away."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        _set(variables)
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _environment() -> Callable[[], None]:
    before = dict(os.environ)

    def restore() -> None:
        added: dict[str, str | None] = dict.fromkeys(os.environ.keys() - before.keys())
        _set({**added, **before})

    return restore


def _start_method() -> Callable[[], None]:
    before = multiprocessing.get_start_method(allow_none=True)
    return lambda: multiprocessing.set_start_method(before, force=True)


def _signals() -> Callable[[], None]:
    if threading.current_thread() is not threading.main_thread():
        return lambda: None  # SGLang leaves them alone too: Python allows it to the main thread only
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)

    return restore


def _root_logger() -> Callable[[], None]:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)

    def restore() -> None:
        root.setLevel(level)
        for handler in [each for each in root.handlers if each not in handlers]:
            root.removeHandler(handler)
        for handler in [each for each in handlers if each not in root.handlers]:
            root.addHandler(handler)

    return restore


def _event_loops() -> Callable[[], None]:
    before = asyncio.get_event_loop_policy()
    return lambda: asyncio.set_event_loop_policy(before)


def _limits() -> Callable[[], None]:
    before = {which: resource.getrlimit(which) for which in _LIMITS}

    def restore() -> None:
        for which, (soft, _) in before.items():
            resource.setrlimit(which, (soft, resource.getrlimit(which)[1]))

    return restore


def _garbage_collection() -> Callable[[], None]:
    before = gc.get_threshold()
    return lambda: gc.set_threshold(*before)


def _random_states() -> Callable[[], None]:
    before: dict[str, Any] = capture_random_state()
    return lambda: restore_random_state(before)


def _hooks() -> Callable[[], None]:
    before = sys.excepthook, list(warnings.filters)

    def restore() -> None:
        sys.excepthook = before[0]
        warnings.filters[:] = before[1]  # type: ignore[index] # a list, whatever its declaration says

    return restore


_PARTS = (
    _environment,
    _start_method,
    _signals,
    _root_logger,
    _event_loops,
    _limits,
    _garbage_collection,
    _random_states,
    _hooks,
)
