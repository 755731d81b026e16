"""How far a conversion is, for those who wait."""

from __future__ import annotations

import sys
import time

__all__ = ["Progress"]

_EVERY = 2.0


class Progress:
    """Says on standard error how much is done, every two seconds at most.

    Args:
        what: is done.
        total: bytes.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._told = time.monotonic()

    def add(self, count: int) -> None:
        """``count`` more bytes are done."""
        self._done += count
        now = time.monotonic()
        if now - self._told >= _EVERY:
            self._told = now
            self._tell()

    def end(self) -> None:
        """All is done."""
        self._done = self._total
        self._tell()

    def _tell(self) -> None:
        done, total = self._done / 10**9, self._total / 10**9
        print(f"{self._what}: {done:.2f} of {total:.2f} GB", file=sys.stderr, flush=True)  # noqa: T201
