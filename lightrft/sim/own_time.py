"""Real time that ranks spend in their own code, told apart from that of the simulator: a scheduler with a stopwatch."""

from __future__ import annotations

from collections import defaultdict
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any

from lightrft.sim.scheduler import Scheduler, Task

if TYPE_CHECKING:
    from lightrft.sim.calls import Call
    from lightrft.sim.places import Place

__all__ = ["TimedScheduler"]


class TimedScheduler(Scheduler):
    """The stopwatch runs while a task runs its own code, and stands still inside calls and while ranks are switched.

    Attributes:
        own: nanoseconds that ranks spent in their own code on the way to a call, by line and operation of the call.
        own_at_end: nanoseconds that they spent after their last calls.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.own: defaultdict[tuple[Place, str], int] = defaultdict(int)
        self.own_at_end = 0
        self._started: int | None = None
        self._spent: defaultdict[Task, int] = defaultdict(int)
        """What a task has spent since its last call."""
        self._begun: set[Task] = set()

    def start(self) -> None:
        """The running task goes on with its own code."""
        self._started = perf_counter_ns()

    def stop(self, task: Task) -> None:
        """The running task, ``task``, comes to the simulator."""
        if self._started is not None:
            self._spent[task] += perf_counter_ns() - self._started
            self._started = None

    def stop_at(self, call: Call, task: Task) -> None:
        """The running task makes a call."""
        self.stop(task)
        self.own[call.place, call.signature.operation] += self._spent.pop(task, 0)

    def finish(self, task: Task) -> None:
        """As every scheduler."""
        self.stop(task)
        self.own_at_end += self._spent.pop(task, 0)
        super().finish(task)

    def _leave(self, task: Task) -> None:
        from_own_code = self._started is not None
        self.stop(task)
        super()._leave(task)
        if from_own_code:
            self.start()

    def _hand_to(self, task: Task | None) -> None:
        if task is not None and task not in self._begun:
            self._begun.add(task)
            self.start()
        super()._hand_to(task)
