"""Programs that would go on for ever: the run ends all the same, and says why."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from lightrft.errors import CollectiveTimeoutError, DeadlockError, RankFailedError
from lightrft.sim import SimWorld
from lightrft.sim.other_threads import exceptions_of_threads, frame_of_thread


def culprits(caught):
    return [culprit.rank for culprit in caught.value.report.culprits]


def test_polling_for_a_collective_that_a_rank_never_joins_ends():
    def run():
        dist.init_process_group("nccl")
        if dist.get_rank() == 1:
            return
        work = dist.all_reduce(torch.ones(2), async_op=True)
        while not work.is_completed():
            pass

    with pytest.raises((DeadlockError, CollectiveTimeoutError)) as caught:
        SimWorld(3).run(run)
    assert culprits(caught) == [1]


def test_polling_a_store_for_a_key_nobody_sets_ends():
    def run():
        dist.init_process_group("gloo")
        store = dist.distributed_c10d._get_default_store()
        while not store.check(["weights ready"]):
            pass

    with pytest.raises(DeadlockError, match="store.check"):
        SimWorld(2).run(run)


def test_a_rank_that_swallows_every_exception_does_not_keep_a_failed_run():
    def run():
        dist.init_process_group("nccl")
        if dist.get_rank() == 1:
            return
        while True:
            try:
                dist.barrier()
            except:  # noqa: E722 - the point
                continue

    with pytest.raises(DeadlockError) as caught:
        SimWorld(3).run(run)
    assert culprits(caught) == [1]


def test_a_rank_that_spins_does_not_keep_a_failed_run():
    def run():
        if os.environ["RANK"] == "1":
            raise ValueError("no reward model")
        while True:
            time.time()

    with pytest.raises(RankFailedError, match="rank 1 failed: ValueError: no reward model"):
        SimWorld(2).run(run)


@pytest.mark.parametrize("wait", ["store", "lock", "event"])
def test_a_heartbeat_thread_does_not_hide_a_wait_that_has_no_end(wait):
    lock, event = threading.Lock(), threading.Event()

    def beat():
        while True:
            time.sleep(1)

    def run():
        dist.init_process_group("nccl")
        threading.Thread(target=beat, daemon=True).start()
        if dist.get_rank() == 1:
            if wait == "store":
                dist.distributed_c10d._get_default_store().get("never set")
            elif wait == "lock":
                lock.acquire()
                lock.acquire()
            else:
                event.wait()
        dist.barrier()

    with pytest.raises((DeadlockError, CollectiveTimeoutError)) as caught:
        SimWorld(3).run(run)
    assert culprits(caught) == [1]


def test_a_signal_to_oneself_ends_the_rank_or_calls_its_handler():
    caught_signals = []

    def run():
        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGUSR1, lambda number, _: caught_signals.append(number))
            os.kill(os.getpid(), signal.SIGUSR1)
            return "alive"
        os.kill(os.getpid(), signal.SIGTERM)
        return "alive"

    with pytest.raises(RankFailedError, match="SystemExit: -15") as caught:
        SimWorld(2).run(run)
    assert culprits(caught) == [1]
    assert caught_signals == [signal.SIGUSR1]


def test_the_profiler_works_on_one_rank_and_is_refused_on_a_second():
    def run(ranks):
        dist.init_process_group("gloo")
        if dist.get_rank() in ranks:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                dist.barrier()
                torch.ones(2).add(1)
            assert any(event.name == "aten::add" for event in profile.events())
        else:
            dist.barrier()
        dist.destroy_process_group()

    SimWorld(2).run(run, [1])
    with pytest.raises(RankFailedError, match="torch.profiler keeps one profile per process, and rank"):
        SimWorld(2).run(run, [0, 1])


def test_a_compiled_function_runs_as_written_on_every_rank():
    @torch.compile(backend="eager")
    def shifted(tensor):
        return tensor + dist.get_rank()

    def run():
        dist.init_process_group("nccl")
        result = shifted(torch.zeros(2)).tolist()
        dist.destroy_process_group()
        return result

    assert SimWorld(3).run(run) == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="collects garbage only between bytecodes")
def test_looking_at_other_threads_never_collects_garbage():
    """A collection in there could stop the process for ever, if a thread ends meanwhile."""
    callers, go_on = [], threading.Event()
    others = [threading.Thread(target=go_on.wait) for _ in range(20)]
    for thread in others:
        thread.start()

    def note(phase, _):
        callers.append(sys._getframe(1).f_code.co_name)

    threshold = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(1)
    try:
        found = frame_of_thread(others[0].ident), exceptions_of_threads()
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(note)
        go_on.set()
        for thread in others:
            thread.join()
    assert all(found)
    assert callers
    assert "_without_collection" not in callers
    assert gc.isenabled()
