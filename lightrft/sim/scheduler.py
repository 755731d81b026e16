"""Who runs next. One task runs at a time and hands the baton on where it blocks.

Every simulated rank is a thread with a lock of its own. The thread that holds the baton runs; all others wait on their
locks. Blocking means: choose the next task, load its process state, release its lock, wait on one's own. When no task
can run, virtual time jumps to the next deadline; when there is none either, the run is stuck and somebody has to say
why. Nothing here knows about collectives.
"""

from __future__ import annotations

import _thread
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Protocol

from lightrft.sim.current import _local

if TYPE_CHECKING:
    import threading

    from lightrft.sim.places import Place
    from lightrft.sim.rank import SimRank

__all__ = ["Killed", "Scheduler", "Task", "Waiting"]

_new_lock = _thread.allocate_lock  # the real one: inside a run the name gives locks of the simulation


_MOST_FRUITLESS = 20_000
"""Questions asked in vain, with nothing else happening, after which nobody expects an answer."""

_MOST_LONELY = 2_000
"""Jumps of time that woke nobody but daemon threads, after which the others are seen as waiting for ever."""

MOST_REVIVALS = 50
"""How often a task that was told to end may catch that and go on, before it is left standing."""


class Killed(BaseException):
    """Unwinds a task after the run has failed or ended. Not an ``Exception``: user code should not catch it."""


class Waiting(Protocol):
    """What a task waits in: a collective, a receive, a store key, a lock, a sleep."""

    place: Place

    def describe(self) -> str:
        """The operation as a report shows it, without its place."""


def _switch_nothing(_leaving: SimRank | None, _entering: SimRank) -> None:
    pass


class Task:
    """One thread of one simulated rank."""

    __slots__ = (
        "by_deadline",
        "daemon",
        "finished",
        "ident",
        "joiners",
        "killed",
        "lock",
        "name",
        "number",
        "polled",
        "queued",
        "rank",
        "registered_at",
        "revivals",
        "scheduler",
        "thread",
        "waiting",
        "wakes",
    )

    def __init__(self, scheduler: Scheduler, rank: SimRank, name: str, *, daemon: bool = False) -> None:
        self.scheduler = scheduler
        self.rank = rank
        self.name = name
        self.daemon = daemon
        self.lock = _new_lock()
        self.lock.acquire()
        self.waiting: Waiting | None = None
        self.killed = False
        self.finished = False
        self.by_deadline = False
        self.queued = False
        self.polled = -1
        self.revivals = 0
        self.wakes = 0
        self.ident = 0
        self.registered_at: Place | None = None
        """Where the exit function that it runs was registered: the line to show if that has none of its own."""
        self.thread: threading.Thread | None = None
        self.joiners: list[Task] = []
        self.number = 0
        """Position among the tasks of the run."""


class Scheduler:
    """Holds the ready tasks, the deadlines and the virtual clock (nanoseconds since the start of the run)."""

    def __init__(
        self,
        *,
        random: Random | None,
        switch: Callable[[SimRank | None, SimRank], None],
        stuck: Callable[[], None],
        watch: Callable[[], None],
        is_call: Callable[[Waiting | None], bool],
    ) -> None:
        self.now = 0
        self.ready: deque[Task] = deque()
        self.tasks: list[Task] = []
        self.running: Task | None = None
        self.switches = 0
        self.closing = False
        self.stranded = 0
        self.clock_reads = 0
        self._random = random
        self._switch = switch
        self._stuck = stuck
        self._watch = watch
        self._is_call = is_call
        self.watch_at = 1 << 62
        """Virtual time (ns) at which ``watch`` looks for collectives that wait for too long."""
        self.drain_until: int | None = None
        """Once set: the run has failed; ready tasks go on until they block, or until this many switches."""
        self._fruitless = 0
        self._progress = 0
        self._lonely = 0
        self._timers: list[tuple[int, int, Task, int]] = []
        self._order = itertools.count()
        self._loaded: SimRank | None = None
        self.all_done = _new_lock()
        self.all_done.acquire()

    # -- called by the thread that starts the run ---------------------------------------------------------------

    def begin(self) -> None:
        """Hand the baton to the first ready task."""
        self._hand_to(self._next())

    # -- called by the running task -----------------------------------------------------------------------------

    def block(self, waiting: Waiting, deadline: int | None = None) -> bool:
        """Wait until :meth:`wake`, or until virtual time reaches ``deadline`` (ns).

        Returns:
            True if woken, False if the deadline came first.

        Raises:
            Killed: the run has failed or ended meanwhile.
        """
        task = _local.task
        assert task is not None
        if task.killed:
            self.end_of(task)
        task.waiting = waiting
        task.by_deadline = False
        task.wakes += 1
        if deadline is not None:
            heapq.heappush(self._timers, (max(deadline, self.now), next(self._order), task, task.wakes))
        self._leave(task)
        task.waiting = None
        return not task.by_deadline

    def wake(self, task: Task) -> None:
        """Make a blocked task ready; it runs when its turn comes. Waking it twice is waking it once."""
        task.wakes += 1
        self._progress += 1
        if not task.queued and not task.finished:
            task.queued = True
            self.ready.append(task)

    def add(self, task: Task) -> None:
        """Take up a new task; it runs when its turn comes."""
        task.number = len(self.tasks)
        self.tasks.append(task)
        self.wake(task)

    def wake_all(self, tasks: list[Task]) -> None:
        """As :meth:`wake`, for many, in order."""
        for task in tasks:
            self.wake(task)

    def yield_now(self) -> bool:
        """Let another ready task run first. Returns whether there was one."""
        task = _local.task
        assert task is not None
        if task.killed:
            raise Killed
        if not self.ready:
            return False
        task.wakes += 1
        task.queued = True
        self.ready.append(task)
        self._leave(task)
        return True

    def interleave(self) -> None:
        """A point at which a random schedule may run another task first; nothing under ``fifo``."""
        if self._random is not None and self.ready:
            self.yield_now()

    def end_of(self, task: Task) -> None:
        """A task that was told to end calls again: tell it again, and leave it standing if it will not hear.

        Raises:
            Killed: always, unless the task is left standing.
        """
        task.revivals += 1
        if task.revivals > MOST_REVIVALS and self.running is task:
            self.finish(task)
            self.stranded += 1
            while True:
                task.lock.acquire()
        raise Killed

    def finish(self, task: Task) -> None:
        """The running task ends: hand the baton on for the last time."""
        task.finished = True
        task.waiting = None
        self.wake_all(task.joiners)
        task.joiners = []
        following = self._next()
        if following is None:
            self.running = None
            self.all_done.release()
        else:
            self._hand_to(following)

    def kill_all(self) -> None:
        """Make every unfinished task raise :class:`Killed` at the point where it waits."""
        self.closing = True
        self._timers.clear()
        self.ready.clear()
        for task in self.tasks:
            task.queued = False
            if not task.finished:
                task.killed = True
                if task is not self.running:
                    self.wake(task)

    def abandon(self) -> None:
        """Give up tasks that cannot be stopped: whenever they come back they unwind, and touch nothing on the way."""
        self._switch = _switch_nothing
        self._stuck = self.kill_all
        self.kill_all()

    def expire_next(self) -> bool:
        """Jump to the next deadline and make its task ready. Returns whether there was one."""
        while self._timers:
            when, _, task, wakes = heapq.heappop(self._timers)
            if task.finished or task.wakes != wakes:
                continue  # woken by something else before its time
            until = max(self.now, when)
            while self.watch_at <= until:
                self.now = max(self.now, self.watch_at)
                self._watch()
                if self.closing:
                    return True
            self.now = until
            task.by_deadline = True
            self.wake(task)
            return True
        return False

    def next_deadline(self) -> int | None:
        """The earliest deadline anybody still waits for, in ns of virtual time."""
        while self._timers:
            when, _, task, wakes = self._timers[0]
            if not task.finished and task.wakes == wakes:
                return when
            heapq.heappop(self._timers)
        return None

    def give_turn(self) -> bool:
        """The running task asked in vain and will ask again: let the others run first.

        Returns:
            False, without having let anybody run, if everybody who could run has asked in vain since anything happened.
        """
        task = _local.task
        assert task is not None
        progress = self._progress
        if task.polled == progress and all(other.polled == progress for other in self.ready):
            return False
        self._fruitless = 0
        task.polled = progress
        self.yield_now()
        return True

    def poll(self, waiting: Waiting) -> None:
        """As :meth:`give_turn`; where that does not help, let virtual time move on.

        Raises:
            Killed: nothing but asking in vain has happened for very long, or the run has failed meanwhile.
        """
        task = _local.task
        assert task is not None
        task.waiting = waiting
        if self.drain_until is not None and not self.ready:
            self._give_up()
        if not self.give_turn():
            if not self.expire_next():
                self._fruitless += 1
                if self._fruitless > _MOST_FRUITLESS:
                    self._give_up()
                self.advance(1000 << min(self._fruitless, 24))
            self.yield_now()
        task.waiting = None

    def _give_up(self) -> None:
        """The running task waits for something that cannot come."""
        self._stuck()
        if self.closing:
            raise Killed

    def advance(self, nanoseconds: int) -> None:
        """Let virtual time pass while the running task works."""
        self.now += nanoseconds
        if self.now >= self.watch_at:
            self._watch()

    def pass_time(self, nanoseconds: int) -> None:
        """Real time has passed while the running task waited outside: alarms that lie in it go off."""
        until = self.now + nanoseconds
        while (deadline := self.next_deadline()) is not None and deadline <= until:
            self.expire_next()
        self.advance(max(0, until - self.now))

    # -- inside -------------------------------------------------------------------------------------------------

    def _next(self) -> Task | None:
        """The task to run next; None if all have ended, or if the run was just given up (:meth:`kill_all`)."""
        ready = self.ready
        if self.drain_until is not None and self.switches > self.drain_until:
            self._stuck()
        while not ready:
            if self.closing or (self.drain_until is None and not self._hopeless() and self._expire_for_somebody()):
                if self.closing and not ready:
                    return None
                continue
            if all(task.finished for task in self.tasks):
                return None
            self._stuck()
        if self._random is not None and len(ready) > 1 and not self.closing:
            position = self._random.randrange(len(ready))
            task = ready[position]
            del ready[position]
        else:
            task = ready.popleft()
        task.queued = False
        return task

    def _expire_for_somebody(self) -> bool:
        """As :meth:`expire_next`, unless time has long served nobody but daemon threads."""
        self._lonely += 1
        return self._lonely <= _MOST_LONELY and self.expire_next()

    def _hopeless(self) -> bool:
        """Whether only daemon threads still wait for time, while everybody else waits for one another.

        A heartbeat thread that sleeps for ever would otherwise hide every deadlock.
        """
        if not any(task.daemon and not task.finished for task in self.tasks):
            return False
        return all(
            task.finished
            or (task.daemon and not self._is_call(task.waiting))
            or (not task.daemon and self._is_call(task.waiting))
            for task in self.tasks
        )

    def _leave(self, task: Task) -> None:
        following = self._next()
        if task.killed:
            if following is not None:
                following.queued = True
                self.ready.appendleft(following)
            raise Killed
        if following is not task:
            assert following is not None
            self._hand_to(following)
            task.lock.acquire()
            if task.killed:
                raise Killed

    def _hand_to(self, task: Task | None) -> None:
        assert task is not None
        rank = task.rank
        if rank is not self._loaded:
            self._switch(self._loaded, rank)
            self._loaded = rank
        self.switches += 1
        if self._lonely and not task.daemon:
            self._lonely = 0
        self.running = task
        task.lock.release()
