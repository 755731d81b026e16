"""Every measurement, made once a session and shared by the tests and the table.

Simulated ranks and the threaded group are measured in turns (A B A B): a machine changes its speed while it works, so
only ratios of neighbours are compared, and medians of them.
"""

from __future__ import annotations

import _thread
import functools
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import groups
from benchmarks.groups import Body, now, simulated, threaded, threaded_on_one_core
from benchmarks.operations import COMPARED, OPERATIONS, make_all_reduce, timed
from benchmarks.quiet import quietest
from lightrft.errors import DeadlockError
from lightrft.sim import SimWorld
from lightrft.sim.current import current_task
from lightrft.sim.host import one_core
from lightrft.sim.places import caller_place

__all__ = ["COMPARED", "DEADLOCKS", "compared", "deadlock", "gloo", "many_worlds", "parts", "start_and_end"]

Run = Callable[[int, Body], list[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Microseconds of one call, a rank, of two implementations: ``ours[i]`` was taken just before ``theirs[i]``."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        """Ours as a fraction of theirs, pair by pair."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of :attr:`ratios`."""
        return statistics.median(self.ratios)


@functools.cache
def compared(name: str, ranks: int, *, one_core: bool = False) -> Pair:
    """An operation on simulated ranks and on the threaded group; ``one_core`` pins the threaded group as we are."""
    operation = OPERATIONS[name]
    calls = operation.make(ranks)
    body = timed(ranks, calls, operation.iterations[ranks], warm=operation.warm)
    other = threaded_on_one_core if one_core else threaded

    def slowest(run: Run) -> float:
        return max(run(ranks, body))

    pairs = quietest(lambda: (slowest(simulated), slowest(other)))
    return Pair(ours=[ours for ours, _ in pairs], theirs=[theirs for _, theirs in pairs])


@functools.cache
def gloo(ranks: int) -> dict[str, list[float]]:
    """Microseconds of one call, a rank, for every operation on real gloo processes; and their memory (MiB)."""
    results: dict[str, list[float]] = groups.gloo_processes(ranks)
    return results


@functools.cache
def start_and_end(kind: str) -> dict[str, list[float]]:
    """1024 ranks of ``kind`` (simulated or threaded) start, meet and end, in fresh processes.

    Returns:
        ``first``: seconds for the first world of a process; ``later``: for the one after it; ``mib_per_rank``.
    """
    runs = quietest(lambda: groups.in_fresh_process("fresh_child", kind))
    return {key: [run[key] for run in runs] for key in ("first", "later", "mib_per_rank")}


@functools.cache
def many_worlds() -> dict[str, float]:
    """1,000 worlds of 4 ranks in a fresh process: ``seconds`` a world, and what grew after the first 100."""
    result: dict[str, float] = quietest(lambda: groups.in_fresh_process("fresh_child", "worlds"), 1)[0]
    return result


@functools.cache
def deadlock(kind: str) -> list[float]:
    """Seconds from the last move of any of 1024 ranks to the exception in the caller."""
    prepare, move = DEADLOCKS[kind]
    moves = [0.0] * DEADLOCKED

    def main() -> None:
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        prepared = prepare(rank)
        dist.barrier()
        moves[rank] = now()
        move(rank, prepared)

    def report() -> float:
        try:
            SimWorld(DEADLOCKED).run(main)
        except DeadlockError:
            return now() - max(moves)
        raise AssertionError("the ranks are in a deadlock, and nobody noticed")

    return quietest(report)


DEADLOCKED = 1024


def _tensor(_: int) -> torch.Tensor:
    return torch.ones(16)


def _tensor_and_two_groups(rank: int) -> Any:
    return _tensor(rank), [dist.new_group(list(range(DEADLOCKED))) for _ in range(2)]


def _skip(rank: int, tensor: torch.Tensor) -> None:
    if rank != DEADLOCKED - 1:
        dist.all_reduce(tensor)


def _cross(rank: int, prepared: Any) -> None:
    tensor, both = prepared
    for group in both if rank % 2 else reversed(both):
        dist.all_reduce(tensor, group=group)


def _receive(rank: int, tensor: torch.Tensor) -> None:
    dist.recv(tensor, (rank + 1) % DEADLOCKED)


DEADLOCKS: Mapping[str, tuple[Callable[[int], Any], Callable[[int, Any], None]]] = MappingProxyType(
    {
        "the last rank skips an all_reduce": (_tensor, _skip),
        "two groups are entered in opposite order": (_tensor_and_two_groups, _cross),
        "everybody receives from the next, nobody sends": (_tensor, _receive),
    }
)
"""What each rank prepares, and its last move."""


# -- the parts of one collective --------------------------------------------------------------------------------------


@functools.cache
def parts(ranks: int = 8) -> dict[str, list[float]]:
    """Microseconds a rank of what an all_reduce of 16 floats consists of; some are differences of two measurements."""
    rounds = quietest(lambda: _parts(ranks))
    return {name: [measured[name] for measured in rounds] for name in rounds[0]}


def _parts(ranks: int) -> dict[str, float]:
    hand_off = _hand_off(ranks)
    swap = _on_ranks(1, _swap_state, 5000)
    place = _on_ranks(1, lambda: caller_place, 5000)
    switch = _on_ranks(ranks, _yield, 1000)
    barrier = _on_ranks(ranks, lambda: dist.barrier, 1000)
    all_reduce = _on_ranks(ranks, lambda: make_all_reduce(1)[0], 1000)
    return {
        "**one switch of ranks**": switch,
        "hand-off between threads (bare threads and locks, placed as ranks are)": hand_off,
        "state of one rank saved, of the next loaded": swap,
        "scheduler, user's globals watched (the rest of a switch)": switch - hand_off - swap,
        "**one all_reduce of 16 floats**": all_reduce,
        "one switch (as above)": switch,
        "user's file and line looked up": place,
        "call, checks, trace, meeting (the rest of a barrier)": barrier - switch - place,
        "tensor checks, reduction, copy out (what an all_reduce adds to a barrier)": all_reduce - barrier,
    }


def _on_ranks(ranks: int, make: Callable[[], Callable[[], object]], iterations: int) -> float:
    def body(_: int) -> float:
        elapsed: float = timed(ranks, [make()], iterations)(0)
        return elapsed

    return max(simulated(ranks, body))


def _swap_state() -> Callable[[], None]:
    task = current_task()
    assert task is not None
    switcher, state = task.rank.world.switcher, task.rank.state

    def swap() -> None:
        switcher.save(state)
        switcher.load(state)

    return swap


def _yield() -> Callable[[], object]:
    task = current_task()
    assert task is not None
    return task.scheduler.yield_now


def _hand_off(ranks: int, rounds: int = 1000) -> float:
    """What the same number of bare threads need to pass a baton round, each with a lock, placed as ranks are."""
    locks = [_thread.allocate_lock() for _ in range(ranks)]
    for lock in locks:
        lock.acquire()
    elapsed: list[float] = []

    def pass_on(member: int) -> None:
        mine, following = locks[member], locks[(member + 1) % ranks]
        mine.acquire()
        begin = now()
        for _ in range(rounds):
            following.release()
            mine.acquire()
        elapsed.append(now() - begin)
        following.release()

    with one_core():
        threads = [threading.Thread(target=pass_on, args=(member,)) for member in range(ranks)]
        for thread in threads:
            thread.start()
    locks[0].release()
    for thread in threads:
        thread.join()
    return max(elapsed) / rounds / ranks * 1e6
