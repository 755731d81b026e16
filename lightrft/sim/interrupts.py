"""Ctrl-C for ranks that handle it: each gets it, as each process of a launch does."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.sim.rank import SimRank

__all__ = ["Interrupts"]


class Interrupts:
    """Hands the first Ctrl-C of a run on to its ranks."""

    def __init__(self) -> None:
        self.pending: dict[int, Callable[..., Any]] = {}
        """Handlers that are to be called, by rank."""
        self._handed_on = False

    def hand_on(self, ranks: Sequence[SimRank]) -> bool:
        """Ctrl-C came. Returns whether the ranks deal with it: all that still run have a handler, and it is the first.

        Each handler is called on its rank, when that next makes a call.
        """
        running = [rank for rank in ranks if rank.main is not None and not rank.main.finished]
        handlers: dict[int, Any] = {rank.index: rank.state.signals.get(signal.SIGINT) for rank in running}
        if self._handed_on or not running or not all(map(_handles, handlers.values())):
            return False
        self._handed_on = True
        self.pending = handlers
        sys.stderr.write("Ctrl-C: the ranks handle it; another one ends the run at once\n")
        sys.stderr.flush()
        return True

    def deliver(self, rank: int) -> None:
        """Call the handler of the running rank, if it is to be called."""
        handler = self.pending.pop(rank, None)
        if handler is not None:
            handler(signal.SIGINT, None)


def _handles(handler: Any) -> bool:
    """Whether a rank has something of its own to do at Ctrl-C; one that ignores it has not."""
    return callable(handler) and handler is not signal.default_int_handler
