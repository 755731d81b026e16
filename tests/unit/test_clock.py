"""Virtual time: sleeping costs nothing, timeouts come at their time, and the watchdog bites."""

from __future__ import annotations

import gc
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightrft.errors import CollectiveTimeoutError, RankFailedError
from lightrft.sim import SimWorld


def real_seconds():
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def test_sleeping_for_an_hour_takes_no_time_and_shows_on_every_clock():
    def run():
        starts = time.time(), time.monotonic(), time.perf_counter(), time.time_ns()
        time.sleep(3600)
        return [
            round(time.time() - starts[0]),
            round(time.monotonic() - starts[1]),
            round(time.perf_counter() - starts[2]),
            round((time.time_ns() - starts[3]) / 1e9),
        ]

    start = real_seconds()
    assert SimWorld(4).run(run) == [[3600] * 4] * 4
    assert real_seconds() - start < 60


def test_ranks_wake_in_the_order_of_their_alarms():
    woken = []

    def run():
        dist.init_process_group("gloo")
        time.sleep(10 - dist.get_rank())
        woken.append(dist.get_rank())
        dist.destroy_process_group()

    SimWorld(3).run(run)
    assert woken == [2, 1, 0]


def test_a_sleep_imported_by_name_is_virtual_too():
    from time import sleep

    assert SimWorld(1).run(imported_by_name) == [7]
    assert sleep is time.sleep


def imported_by_name():
    start = time.time()
    nap(7)
    return round(time.time() - start)


from time import sleep as nap  # noqa: E402 - the alias is the point


def test_a_negative_sleep_is_refused_as_ever():
    with pytest.raises(RankFailedError, match="must be non-negative"):
        SimWorld(1).run(lambda: time.sleep(-1))


def test_two_runs_see_the_same_times():
    def run():
        time.sleep(0.25)
        return time.time(), time.monotonic_ns()

    assert SimWorld(3).run(run) == SimWorld(3).run(run)


def test_no_time_passes_while_garbage_is_collected():
    reads = []

    class Late:
        def __del__(self):
            reads.append(time.monotonic_ns())

    def watch(phase, info):
        reads.append(time.monotonic_ns())

    def run():
        before = time.monotonic_ns()
        late = Late()
        late.itself = late
        del late
        gc.collect()
        return time.monotonic_ns() - before

    plain = SimWorld(1).run(lambda: -time.monotonic_ns() + time.monotonic_ns())
    callbacks = list(gc.callbacks)
    gc.callbacks.append(watch)
    try:
        assert SimWorld(1).run(run) == plain
    finally:
        gc.callbacks.remove(watch)
    assert len(reads) >= 3
    assert gc.callbacks == callbacks


def test_a_loop_that_watches_the_clock_ends():
    def run():
        deadline = time.monotonic() + 0.02
        while time.monotonic() < deadline:
            pass
        return True

    assert SimWorld(1).run(run) == [True]


def test_a_loop_that_polls_a_work_handle_ends():
    def run():
        dist.init_process_group("gloo")
        tensor = torch.ones(2)
        if dist.get_rank() == 0:
            time.sleep(5)
        work = dist.all_reduce(tensor, async_op=True)
        while not work.is_completed():
            pass
        dist.destroy_process_group()
        return tensor.tolist()

    assert SimWorld(3).run(run) == [[3.0, 3.0]] * 3


def test_a_rank_that_is_late_but_in_time_is_waited_for():
    def run():
        dist.init_process_group("nccl", timeout=timedelta(seconds=60))
        if dist.get_rank() == 1:
            time.sleep(59)
        dist.barrier()
        dist.destroy_process_group()

    SimWorld(2).run(run)


def test_a_rank_that_is_too_late_meets_the_watchdog():
    def run():
        dist.init_process_group("nccl", timeout=timedelta(seconds=60))
        if dist.get_rank() == 1:
            time.sleep(61)  # late
        dist.barrier()
        dist.destroy_process_group()

    with pytest.raises(CollectiveTimeoutError, match="waited for 60000 ms.*timeout of the group is 60000 ms") as caught:
        SimWorld(4).run(run)
    (culprit,) = caught.value.report.culprits
    assert culprit.rank == 1
    assert culprit.place.source == "time.sleep(61)  # late"
    assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize(("backend", "limit"), [("nccl", 10 * 60), ("gloo", 30 * 60)])
def test_the_default_timeout_is_that_of_the_backend(backend, limit):
    def run(seconds):
        dist.init_process_group(backend)
        if dist.get_rank() == 1:
            time.sleep(seconds)
        dist.barrier()
        dist.destroy_process_group()

    SimWorld(2).run(run, limit - 1)
    with pytest.raises(CollectiveTimeoutError):
        SimWorld(2).run(run, limit + 1)


def test_an_asynchronous_collective_that_nobody_waits_for_yet_is_watched_too():
    def run():
        dist.init_process_group("nccl", timeout=timedelta(seconds=60))
        if dist.get_rank() == 1:
            time.sleep(100)  # late
        work = dist.all_reduce(torch.ones(2), async_op=True)
        time.sleep(100)
        work.wait()

    with pytest.raises(CollectiveTimeoutError) as caught:
        SimWorld(3).run(run)
    assert [culprit.place.source for culprit in caught.value.report.culprits] == ["time.sleep(100)  # late"]


def test_a_receive_that_waits_for_too_long_names_the_sender():
    def run():
        dist.init_process_group("nccl", timeout=timedelta(seconds=60))
        if dist.get_rank() == 2:
            dist.recv(torch.ones(2), 0)
        elif dist.get_rank() == 0:
            time.sleep(100)
            dist.send(torch.ones(2), 2)

    with pytest.raises(CollectiveTimeoutError) as caught:
        SimWorld(3).run(run)
    assert [culprit.rank for culprit in caught.value.report.culprits] == [0]


def test_a_poll_that_never_succeeds_meets_the_watchdog_of_those_who_wait():
    def run():
        dist.init_process_group("nccl")
        if dist.get_rank() == 0:
            store = dist.distributed_c10d._get_default_store()
            while not store.check(["never set"]):
                pass
        dist.barrier()

    with pytest.raises(CollectiveTimeoutError) as caught:
        SimWorld(3).run(run)
    assert [culprit.rank for culprit in caught.value.report.culprits] == [0]
