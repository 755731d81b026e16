"""``SimWorld(size).run(fn)``: run a function on N simulated ranks in this process."""

from __future__ import annotations

import ctypes
import os
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from lightrft.errors import ConfigError, SimulationError, SimWarning
from lightrft.sim import current, divergence, places, store, threads
from lightrft.sim.adoption import LockAdoption
from lightrft.sim.calls import Call, Event, Group, Meeting, Message, Wait
from lightrft.sim.clock import still_during_collection
from lightrft.sim.collectives import ORDERS
from lightrft.sim.engine.faces import MODES, faces
from lightrft.sim.environ import rank_seed, torchrun_environ
from lightrft.sim.frozen import collecting_by_ranks, frozen_heap
from lightrft.sim.host import one_core, patched, same_parallelism, stack_size
from lightrft.sim.interrupts import Interrupts
from lightrft.sim.own_time import TimedScheduler
from lightrft.sim.point_to_point import unmatched
from lightrft.sim.profiles import check_profile
from lightrft.sim.rank import SimRank
from lightrft.sim.rank_state import StateSwitcher
from lightrft.sim.run_report import RunReport, Usage, make_report
from lightrft.sim.scheduler import MOST_REVIVALS, Killed, Scheduler, Task
from lightrft.sim.shared_globals import SharedGlobals
from lightrft.sim.stall import StallWatcher
from lightrft.sim.surveys import parts_of, user_modules

if TYPE_CHECKING:
    from lightrft.sim.determinism import Observer

__all__ = ["SimWorld"]

_MASTER_PORT = 29500
_STACK_BYTES = 8 << 20
_running = threading.Lock()
_NO_RUN: Any = None


class SimWorld:
    """N simulated ranks that run one function in this process.

    Args:
        size: number of ranks.
        gpus_per_node: ranks on a node; gives ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` and ``GROUP_RANK``.
        seed: draws every choice of a random schedule, and seeds Python's and NumPy's generators of every rank.
        schedule: ``fifo`` runs ranks in the order in which they become ready; ``random`` draws it from the seed.
        numerics: order in which reductions add: ``rank``, ``ring``, ``tree`` or ``permuted``.
        profile: what is accepted: ``strict`` (what every real backend accepts), ``gloo`` or ``nccl``.
        rank_local: modules or packages of which every rank has its own globals.
        cuda: whether ``torch.cuda.is_available()`` says yes inside.
        engines: what ``import vllm`` and ``import sglang`` give inside: fake engines that run the model itself
            (``model``), faster ones that derive tokens from a digest of the weights (``hash``), or what is installed
            (``False``).
        strict: whether leftovers at the end of a run are an error instead of a warning.
        check_determinism: run everything twice and stop at the first event, random draw or tensor that differs.
        stall_after: seconds (real) a rank may block outside the simulator before a dump names it.
        stall_limit: seconds (real) after which such a run fails.

    A world may run several functions, one after the other; each run starts N fresh ranks.
    """

    def __init__(
        self,
        size: int,
        *,
        gpus_per_node: int = 8,
        seed: int = 0,
        schedule: str = "fifo",
        numerics: str = "rank",
        profile: str = "strict",
        rank_local: Sequence[str] = (),
        cuda: bool = False,
        engines: str | bool = "model",
        strict: bool = False,
        check_determinism: bool = False,
        stall_after: float = 5.0,
        stall_limit: float = 300.0,
    ) -> None:
        if type(size) is not int or size < 1:
            raise ConfigError(f"size={size!r}: expected the number of ranks, at least 1")
        if type(gpus_per_node) is not int or gpus_per_node < 1:
            raise ConfigError(f"gpus_per_node={gpus_per_node!r}: expected a number of at least 1")
        if schedule not in ("fifo", "random"):
            raise ConfigError(f"schedule={schedule!r} is unknown: expected 'fifo' or 'random'")
        if numerics not in ORDERS:
            raise ConfigError(f"numerics={numerics!r} is unknown: expected one of {', '.join(ORDERS)}")
        if isinstance(rank_local, str):
            raise ConfigError(f"rank_local={rank_local!r}: expected a list of module names, e.g. [{rank_local!r}]")
        check_profile(profile)
        if engines not in (False, *MODES):
            raise ConfigError(f"engines={engines!r} is unknown: expected False, or one of {', '.join(MODES)}")
        self.size = size
        self.gpus_per_node = gpus_per_node
        self.seed = seed
        self.schedule = schedule
        self.numerics = numerics
        self.profile = profile
        self.rank_local = list(rank_local)
        self.cuda = cuda
        self.engines = engines
        self.strict = strict
        self.check_determinism = check_determinism
        self.stall_after = stall_after
        self.stall_limit = stall_limit
        self.replay = ""
        """The command that repeats the run, shown in reports; set by what starts it."""
        self.warn: Callable[[str], None] | None = None
        """Takes warnings about a whole run, in place of :func:`warnings.warn`; set by what starts it."""
        self.timed = False
        """Whether a run measures how much real time the code of the ranks takes; see :meth:`report`."""
        self._calls: list[Call] = []
        self._observer: Observer | None = None
        self._reset()

    def _reset(self) -> None:
        self._calls = []
        self._waits: list[Wait] = []
        self.stopwatch: TimedScheduler | None = None
        self._usage = Usage()
        self.groups: dict[tuple[str, int, tuple[int, ...]], Group] = {}
        self.stores = store.StoreTable()
        self.ranks: list[SimRank] = []
        self.scheduler: Scheduler = _NO_RUN
        self.switcher: StateSwitcher = _NO_RUN
        self.shared: SharedGlobals = _NO_RUN
        self._first_creations: list[tuple[tuple[int, ...], str]] = []
        self._failures: list[tuple[SimRank, BaseException]] = []
        self._mismatch: divergence.Mismatch | None = None
        self._verdict: SimulationError | None = None
        self._to_be_refused: list[Task] = []
        self._interrupted = False
        self._interrupts = Interrupts()
        self.profiled: int | None = None
        """The rank that uses torch's profiler."""
        self._leftovers: list[tuple[int, places.Place, str]] = []

    # -- what a user calls --------------------------------------------------------------------------------------

    @property
    def calls(self) -> list[Call]:
        """The calls behind :attr:`trace`."""
        return self._calls

    @property
    def trace(self) -> list[Event]:
        """What the ranks of the latest run did, in the order in which it happened."""
        return [call.event() for call in self._calls]

    @property
    def virtual_time(self) -> int:
        """Nanoseconds of virtual time that the latest run took, or has taken until now."""
        return self._usage.virtual if self.scheduler is _NO_RUN else self.scheduler.now

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Run ``fn(*args, **kwargs)`` on every rank.

        Returns:
            the results, by rank.

        Raises:
            DeadlockError: no rank can go on.
            CollectiveMismatchError: ranks disagree about a collective, a message, or a group.
            CollectiveTimeoutError: a rank kept others waiting for longer than the timeout of the group.
            RankFailedError: ``fn`` raised on a rank; that exception is the ``__cause__``.
            UnfinishedError: with ``strict=True``, something was left unfinished at the end.
        """
        if current.current_task() is not None:
            raise SimulationError("SimWorld.run was called inside a simulated rank: worlds cannot be nested")
        if not _running.acquire(blocking=False):
            raise SimulationError("another SimWorld is running in this process: run one after the other")
        try:
            if self.check_determinism:
                from lightrft.sim.determinism import run_twice

                return run_twice(self, fn, args, kwargs)
            return self._run_once(fn, args, kwargs)
        finally:
            self._let_go()
            _running.release()

    def report(self) -> RunReport:
        """What the latest run did, also one that failed: collectives, messages, bytes, time; as text with ``str()``.

        Set ``timed`` to True before the run to know how much real time the code of the ranks took. In a rank, it is
        what happened until now, without times.
        """
        return make_report(self)

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Write the latest run, also one that failed, as a trace for Perfetto and ``chrome://tracing``.

        Args:
            path: name of the file, such as ``trace.json``; a file of that name is overwritten.

        Raises:
            OSError: the file cannot be written.
        """
        from lightrft.sim.trace_file import write

        write(self, os.fspath(path))

    def dump_flight_record(self, path: str | os.PathLike[str]) -> list[str]:
        """Write the latest run in the format of PyTorch's flight recorder, one file per rank.

        Args:
            path: prefix of the file names; rank ``r`` is written to ``{path}{r}``.

        Returns:
            the names of the files.
        """
        from lightrft.sim.flight_recorder import write

        return write(self, os.fspath(path))

    # -- one run ------------------------------------------------------------------------------------------------

    def _run_once(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        self._reset()
        results: list[Any] = [None] * self.size
        random = Random(self.seed) if self.schedule == "random" else None
        modules = user_modules()
        parts = parts_of(modules)  # before names in them are replaced: what an earlier run found still holds
        with ExitStack() as stack:
            self.switcher = StateSwitcher(self.rank_local)
            stack.enter_context(frozen_heap())
            stack.enter_context(collecting_by_ranks(self.size))
            if isinstance(self.engines, str):
                stack.enter_context(faces(self.engines))
            stack.enter_context(still_during_collection())
            stack.enter_context(same_parallelism())
            stack.enter_context(patched())  # before the switcher reads modules: what it writes back is patched too
            stack.enter_context(self.switcher.around_run())
            self.scheduler = (TimedScheduler if self.timed else Scheduler)(
                random=random,
                switch=self._switch,
                stuck=self._stuck,
                watch=self._watch,
                is_call=lambda waiting: isinstance(waiting, Call),
            )
            self.stopwatch = self.scheduler if isinstance(self.scheduler, TimedScheduler) else None
            self.shared = SharedGlobals(self.switcher.is_local)
            self.ranks = [self._new_rank(index) for index in range(self.size)]
            locks = LockAdoption()
            stack.callback(locks.restore)
            fn = locks.adopt(fn)
            args, kwargs = tuple(map(locks.adopt, args)), {key: locks.adopt(value) for key, value in kwargs.items()}
            locks.adopt_modules(modules, parts)
            self.shared.begin(modules, parts)
            with stack_size(_STACK_BYTES), one_core():
                for rank in self.ranks:
                    self._start(rank, fn, args, kwargs, results)
            self._drive()
        self._report()
        return results

    def _new_rank(self, index: int) -> SimRank:
        environ = torchrun_environ(
            index,
            self.size,
            gpus_per_node=self.gpus_per_node,
            port=_MASTER_PORT,
            threads=os.environ.get("OMP_NUM_THREADS", "1"),
        )
        environ["LIGHTRFT_POISON_BUCKETS"] = "1"
        seed = rank_seed(self.seed, index)
        state = self.switcher.new_state(environ, seed)
        return SimRank(self, index, state, self.gpus_per_node, self.cuda)

    def _start(self, rank: SimRank, fn: Any, args: Any, kwargs: Any, results: list[Any]) -> None:
        task = Task(self.scheduler, rank, f"rank {rank.index}")
        rank.main = task
        self.scheduler.add(task)
        thread = threading.Thread(
            target=self._rank_thread, args=(task, fn, args, kwargs, results), name=f"rank {rank.index}", daemon=True
        )
        thread.start()
        task.ident = thread.ident or 0
        task.thread = thread

    def _rank_thread(self, task: Task, fn: Any, args: Any, kwargs: Any, results: list[Any]) -> None:
        task.lock.acquire()
        current.bind(task)
        rank = task.rank
        threading.current_thread()._daemonic = False  # type: ignore[attr-defined] # threads it starts inherit this
        try:
            threads.prepare_thread()
            if not task.killed:
                results[rank.index] = self._call_main(fn, args, kwargs)
                threads.join_leftover(task)
                self._run_atexit(task)
                if self._observer is not None:
                    self._observer.returned(rank)
                self._note_leftovers(rank)
        except Killed:
            if self._interrupted:
                task.scheduler.kill_all()
        except threads.ProcessExit as error:
            if error.code:
                self._fail(rank, SystemExit(error.code))
        except BaseException as error:  # noqa: BLE001 - a rank may raise anything; the run reports it
            self._fail(rank, error)
        finally:
            rank.let_go()
            torch._C._distributed_c10d._unregister_all_process_groups()
            task.scheduler.finish(task)
            current.bind(None)

    def _call_main(self, fn: Any, args: Any, kwargs: Any) -> Any:
        try:
            return fn(*args, **kwargs)
        except SystemExit as error:
            if error.code not in (None, 0):
                raise
            return None

    def _run_atexit(self, task: Task) -> None:
        entries = task.rank.state.atexit
        while entries:
            function, args, kwargs, task.registered_at = entries.pop()
            function(*args, **kwargs)
        task.registered_at = None

    def _switch(self, leaving: SimRank | None, entering: SimRank) -> None:
        if leaving is not None:
            self.switcher.save(leaving.state)
            self.shared.look(leaving.index)
        self.switcher.load(entering.state)

    def _drive(self) -> None:
        """Hand over the baton and wait for the end, watching for ranks that block outside the simulator."""
        scheduler = self.scheduler
        watcher = StallWatcher(self)
        began = time.perf_counter_ns()
        try:
            scheduler.begin()
            self._wait_for_the_end(watcher)
        except BaseException:
            self._interrupt()
            raise
        finally:
            real = time.perf_counter_ns() - began
            self._usage = Usage(real, scheduler.now, scheduler.switches)
            if self.stopwatch is not None:
                self._usage = self._usage._replace(own=self.stopwatch.own, own_at_end=self.stopwatch.own_at_end)
        for rank in self.ranks:
            for task in (rank.main, *rank.threads):
                if task is not None and task.thread is not None and task.revivals <= MOST_REVIVALS:
                    task.thread.join()

    def _wait_for_the_end(self, watcher: StallWatcher) -> None:
        while True:
            try:
                while not self.scheduler.all_done.acquire(timeout=watcher.interval):
                    watcher.look()
            except KeyboardInterrupt:
                if not self._interrupts.hand_on(self.ranks):
                    raise
            else:
                return

    def interrupt_failed_run(self) -> None:
        """The run has failed, and a rank goes on without ever coming to the simulator: stop that rank."""
        task = self.scheduler.running
        if task is not None and not task.finished:
            task.killed = True
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(task.ident), ctypes.py_object(Killed))

    def _interrupt(self) -> None:
        """Stop all ranks from outside: the running one is interrupted, the others end where they wait."""
        self._interrupted = True
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            self.interrupt_failed_run()
            if self.scheduler.all_done.acquire(timeout=0.2):
                return
        self.scheduler.abandon()

    def _let_go(self) -> None:
        """Drop all that only the run needed, so that no cycle keeps its tensors alive. The trace stays."""
        for rank in self.ranks:
            rank.handles.clear()
            rank.outstanding.clear()
            rank.abandoned.clear()
            rank.threads.clear()
            rank.main = None
        for group in self.groups.values():
            group.forget()
        if self.scheduler is not _NO_RUN and self.scheduler.running is None:
            self.scheduler.tasks.clear()
        self.ranks = []
        self._failures = []
        self._mismatch = self._verdict = None
        self.stores = store.StoreTable()
        self.scheduler = self.switcher = self.shared = _NO_RUN
        self.stopwatch = None

    # -- what the parts of a run tell the world -----------------------------------------------------------------

    def record(self, call: Call, inputs: Sequence[Any] = ()) -> None:
        """A rank made a call and contributes ``inputs``."""
        self._calls.append(call)
        self.ranks[call.rank].latest_call = call
        if self._interrupts.pending:
            self._interrupts.deliver(call.rank)
        if self._observer is not None:
            self._observer.called(self.ranks[call.rank], call, inputs)

    def waits(self, call: Call) -> Wait:
        """The running task begins to wait for ``call``, apart from making it."""
        task = current._local.task
        assert task is not None
        if self.stopwatch is not None:
            self.stopwatch.stop(task)
        wait = Wait(call, task.number, self.scheduler.now, len(self._calls) + len(self._waits))
        self._waits.append(wait)
        return wait

    def returned(self, wait: Wait) -> None:
        """The running task goes on after ``wait``."""
        wait.until = self.scheduler.now
        wait.after = len(self._calls) + len(self._waits)
        if self.stopwatch is not None:
            self.stopwatch.start()

    def note_creation(self, rank: SimRank, members: tuple[int, ...], backend: str) -> None:
        """A rank makes a sub-group; all ranks must make the same ones in the same order."""
        position, place = len(rank.creations), places.caller_place(2)
        rank.creations.append((members, backend, place))
        if position == len(self._first_creations):
            self._first_creations.append((members, backend))
        elif self._first_creations[position] != (members, backend):
            self._disagreed(divergence.creation_mismatch(position))
            self._park(divergence.CreationWait(members, place))

    def made_at(self, position: int) -> list[tuple[int, tuple[int, ...], str, places.Place]]:
        """Who made what as group number ``position`` (from 0): rank, members, backend, place."""
        return [(r.index, *r.creations[position]) for r in self.ranks if len(r.creations) > position]

    def disagree(self, meeting: Meeting, call: Call, member: int) -> None:
        """A member came to a meeting with another call than the first one; does not return."""
        meeting.calls[member] = call
        self._disagreed(divergence.call_mismatch(meeting))
        self._park(call)

    def disagree_among(self, meeting: Meeting, problem: str, pairs: Sequence[tuple[int, int]]) -> None:
        """Everybody has come, but what they exchange does not fit; does not return."""
        self._disagreed(divergence.sizes_mismatch(meeting, problem, pairs))
        self._park(meeting.first)

    def disagree_pair(self, send: Call, receive: Call, problem: str, later: Call) -> None:
        """A send and its receive do not fit; does not return."""
        self._disagreed(divergence.message_mismatch(send, receive, problem))
        self._park(later)

    def _disagreed(self, mismatch: divergence.Mismatch) -> None:
        if self._mismatch is None:
            self._mismatch = mismatch
        self._drain()

    def _drain(self) -> None:
        """The run has failed: let the others come to where they wait, then report."""
        if self.scheduler is not _NO_RUN and self.scheduler.drain_until is None:
            self.scheduler.drain_until = self.scheduler.switches + 20 * len(self.scheduler.tasks)

    def _park(self, waiting: Any) -> None:
        while True:
            self.scheduler.block(waiting)

    def watch(self, call: Call) -> None:
        """See to it that ``call`` is looked at when the timeout of its group is over."""
        self.scheduler.watch_at = min(self.scheduler.watch_at, call.since + call.group.timeout)

    def wait_for_meeting(self, meeting: Meeting, call: Call) -> None:
        """Block the running task until ``meeting`` is complete."""
        task = current.current_task()
        assert task is not None
        scheduler = self.scheduler
        limit = call.since + call.group.timeout
        scheduler.watch_at = min(scheduler.watch_at, limit)
        while not meeting.complete:
            meeting.waiters.append(task)
            scheduler.block(call)

    def wait_for_message(self, message: Message) -> None:
        """Block the running task until ``message`` has met its counterpart."""
        task = current.current_task()
        assert task is not None
        scheduler = self.scheduler
        scheduler.watch_at = min(scheduler.watch_at, message.call.since + message.call.group.timeout)
        while not message.matched:
            message.waiter = task
            scheduler.block(message.call)

    def wait_to_be_refused(self, task: Task, call: Call) -> None:
        """Block the running task, whose call is an error of its own, until others have come too or nobody can go on."""
        self._to_be_refused.append(task)
        self.scheduler.block(call)
        self._to_be_refused.remove(task)

    def _fail(self, rank: SimRank, error: BaseException) -> None:
        self._failures.append((rank, error))
        self._drain()

    def _note_leftovers(self, rank: SimRank) -> None:
        for work in rank.outstanding:
            if not work.call.done:
                self._left(rank.index, work.call.place, f"{work.call.describe()} was never waited for")
        rank.abandoned += rank.outstanding
        rank.outstanding.clear()
        tables = rank.tables()
        if tables.pg_map:
            self._left(rank.index, rank.handles[0].made_at, "made a process group and never destroyed it")

    def _left(self, rank: int, place: places.Place, what: str) -> None:
        self._leftovers.append((rank, place, what))

    # -- verdicts -----------------------------------------------------------------------------------------------

    def _stuck(self) -> None:
        """Nobody can run: refuse what waits for that; if nothing does, say why, and end the run."""
        failed = self._failures or self._mismatch is not None or self._verdict is not None
        if self._to_be_refused and not failed and not self.scheduler.closing:
            self.scheduler.wake_all(self._to_be_refused)
            return
        if not self.scheduler.closing and self._verdict is None:
            self._verdict = divergence.verdict(self, self._failures, self._mismatch)
        self.scheduler.kill_all()

    def _watch(self) -> None:
        """Virtual time has come to a point where a collective may have waited for too long."""
        now, earliest = self.scheduler.now, 1 << 62
        waiting = [t.waiting for t in self.scheduler.tasks if isinstance(t.waiting, Call) and not t.finished]
        issued = [work.call for rank in self.ranks for work in rank.outstanding if not work._done()]
        for call in (*waiting, *issued):
            limit = call.since + call.group.timeout
            if limit <= now and self._verdict is None:
                self._verdict = divergence.timeout_verdict(self, call)
                self.scheduler.kill_all()
                return
            earliest = min(earliest, limit)
        self.scheduler.watch_at = earliest

    def _collect_leftovers(self) -> None:
        for group in self.groups.values():
            for call in unmatched(group):
                self._left(call.rank, call.place, f"{call.describe()} never met its counterpart")
        most = max(self.ranks, key=lambda rank: len(rank.creations))
        for rank in self.ranks:
            if len(rank.creations) < len(most.creations):
                members = list(most.creations[len(rank.creations)][0])
                what = f"did not call new_group({members}); every rank must, members of the group or not"
                self._left(rank.index, rank.last_place(), what)

    def _report(self) -> None:
        if self._verdict is not None:
            raise self._verdict
        if self._failures or self._mismatch is not None:
            raise divergence.verdict(self, self._failures, self._mismatch)
        self.switcher.modules.check_used()
        self._collect_leftovers()
        if self._leftovers:
            error = divergence.leftovers(self, self._leftovers)
            if self.strict:
                raise error
            self._warn(str(error))
        for warning in self.shared.warnings():
            self._warn(warning)

    def _warn(self, message: str) -> None:
        if self.warn is not None:
            self.warn(message)
        else:
            warnings.warn(message, SimWarning, stacklevel=5 + self.check_determinism)
