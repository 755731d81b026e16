"""What other threads of the process are doing right now.

CPython 3.11 holds the lock on its list of threads while it collects their frames or exceptions. A collection of garbage
in there runs Python code, which may give way to a thread that is about to end: that one waits for the lock, and holds
the interpreter. So there must be none.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

__all__ = ["exceptions_of_threads", "frame_of_thread"]

T = TypeVar("T")


def frame_of_thread(ident: int) -> FrameType | None:
    """The frame in which the thread ``ident`` stands; None if there is no such thread."""
    return _without_collection(sys._current_frames).get(ident)


def exceptions_of_threads() -> dict[int, Any]:
    """By thread, the exception that it handles, as ``sys._current_exceptions`` gives it."""
    return _without_collection(sys._current_exceptions)


def _without_collection(function: Callable[[], T]) -> T:
    if not gc.isenabled():
        return function()
    gc.disable()
    try:
        return function()
    finally:
        gc.enable()
