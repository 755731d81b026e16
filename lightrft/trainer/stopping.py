"""Ending a run when somebody asks for it: Ctrl-C, or the signal that a job is about to be ended."""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from types import FrameType
from typing import Any, Self

__all__ = ["StopRequest"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Notes a request to stop, so that an iteration can end before the run does.

    As a context, in the main thread, it takes SIGINT (Ctrl-C) and SIGTERM. The first one is noted. Others that come
    soon after belong to it: a launcher passes on what its processes have got already. A later one acts as it did
    before, which for Ctrl-C means ``KeyboardInterrupt``.

    Args:
        patience: seconds that are soon.
    """

    def __init__(self, patience: float = 5.0) -> None:
        self.is_made = False
        self._patience = patience
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def make(self) -> None:
        """Ask the run to end after this iteration."""
        self.is_made = True

    def __enter__(self) -> Self:
        self.is_made = False
        with suppress(ValueError):  # raised where no handler can be set: in threads other than the main one
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what a handler is called with
        now = time.monotonic()
        if not self.is_made:
            self._first = now
            self.make()
        elif now - self._first >= self._patience:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
