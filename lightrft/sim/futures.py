"""Futures of asynchronous operations. Waiting for one lets other ranks run, which a future of C++ cannot do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["SimFuture", "done_future"]

Future = torch.futures.Future


def done_future(value: Any) -> Future[Any]:
    """A future that holds ``value``."""
    future: Future[Any] = Future()
    future.set_result(value)
    return future


class SimFuture(Future[Any]):
    """A future that is completed by whoever asks for it.

    Args:
        settle: completes the future with :meth:`set_result`; may block the rank.
        poll: whether :meth:`settle` would not block; lets other ranks go on first.
    """

    def __init__(self, settle: Callable[[], object], poll: Callable[[], bool]) -> None:
        super().__init__()
        self._settle = settle
        self._poll = poll

    def done(self) -> bool:
        """Whether the value is there."""
        if not super().done() and self._poll():
            self._settle()
        return super().done()

    def wait(self) -> Any:
        """Block the rank until the value is there, and return it."""
        if not super().done():
            self._settle()
        return super().wait()

    def then(self, callback: Callable[[Future[Any]], Any]) -> Future[Any]:
        """A future of what ``callback`` makes of this one."""
        child = SimFuture(self._settle, self._poll)

        def run(parent: Future[Any]) -> None:
            try:
                child.set_result(callback(parent))
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the child
                child.set_exception(error)

        self.add_done_callback(run)
        return child
