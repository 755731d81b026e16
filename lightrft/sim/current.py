"""Which simulated rank runs on this thread.

Everything the simulator replaces asks this module first: a call from a rank's thread is answered by the simulator,
a call from any other thread goes to the real thing.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightrft.sim.scheduler import Task

__all__ = ["current_task"]


class _Local(threading.local):
    task: Task | None = None


_local = _Local()


def current_task() -> Task | None:
    """The simulated task that runs on the calling thread, or ``None`` on a thread that is no rank's."""
    return _local.task


def bind(task: Task | None) -> None:
    """Make ``task`` the task of the calling thread."""
    _local.task = task
