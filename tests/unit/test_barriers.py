"""Barriers, monitored ones too."""

import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from simulated_ranks import on_ranks

from lightrft.errors import RankFailedError


def test_nobody_leaves_a_barrier_before_everybody_has_come():
    come, left = [], []

    def body():
        come.append(dist.get_rank())
        dist.barrier()
        left.append(len(come))
        dist.barrier(async_op=True).wait()
        dist.barrier(device_ids=[0])
        dist.barrier(timeout=timedelta(seconds=1))

    on_ranks(5, body, schedule="random", seed=3)
    assert left == [5] * 5


def test_a_barrier_with_a_timeout_of_its_own_names_who_did_not_come():
    def body():
        if dist.get_rank() != 2:
            dist.barrier(timeout=timedelta(seconds=2))

    with pytest.raises(RankFailedError, match=r"barrier\(\) .* waited 2000 ms .* did not come, or have given up: 2"):
        on_ranks(3, body)


@pytest.mark.parametrize(("wait_all", "named"), [(False, "Rank 1"), (True, "Ranks 1, 3")])
def test_the_monitored_barrier_names_who_did_not_come(wait_all, named):
    def body():
        if dist.get_rank() in (1, 3):
            return "absent"
        try:
            dist.monitored_barrier(timeout=timedelta(seconds=7), wait_all_ranks=wait_all)
        except RuntimeError as error:
            return str(error)

    results = on_ranks(4, body)
    assert results[0] == f"[Rank 0]: {named} failed to pass monitoredBarrier in 7000 ms"
    assert "rank 0, which monitors it, has failed" in results[2]


def test_the_first_rank_of_a_monitored_barrier_gives_up_first():
    def body():
        rank = dist.get_rank()
        if rank == 1:
            return None
        time.sleep(5 if rank == 0 else 0)
        with pytest.raises(RuntimeError, match="Rank 1 failed" if rank == 0 else "rank 0, which monitors it"):
            dist.monitored_barrier(timeout=timedelta(seconds=7))
        return round(time.monotonic())

    assert on_ranks(3, body) == [12, None, 14]


def test_a_monitored_barrier_that_everybody_comes_to_is_passed():
    def body():
        dist.monitored_barrier()
        dist.monitored_barrier(timeout=timedelta(seconds=1), wait_all_ranks=True)
        return True

    assert on_ranks(4, body) == [True] * 4


def test_who_comes_late_to_a_monitored_barrier_is_told():
    def body():
        time.sleep(dist.get_rank())
        try:
            dist.monitored_barrier(timeout=timedelta(milliseconds=500))
        except RuntimeError as error:
            return str(error)

    first, late = on_ranks(2, body)
    assert first.endswith("Rank 1 failed to pass monitoredBarrier in 500 ms")
    assert "rank 0, which monitors it, has failed or never came" in late


@pytest.mark.parametrize("reads", [2100, 3900])  # until the first rank, or everybody, has given up
def test_who_computes_past_the_end_of_a_monitored_barrier_does_not_save_the_others(reads):
    def body():
        if dist.get_rank() == 2:
            for _ in range(reads):
                time.monotonic()  # a microsecond each: nobody else wakes up meanwhile
        try:
            dist.monitored_barrier(timeout=timedelta(milliseconds=1))
        except RuntimeError as error:
            return str(error)

    first, second, late = on_ranks(3, body)
    assert first == "[Rank 0]: Rank 2 failed to pass monitoredBarrier in 1 ms"
    assert "rank 0, which monitors it, has failed" in second
    assert "rank 0, which monitors it, has failed" in late


def test_who_waits_in_a_monitored_barrier_that_its_first_rank_gave_up_is_told():
    def body():
        time.sleep([0, 0, 1.5][dist.get_rank()])
        try:
            dist.monitored_barrier(timeout=timedelta(seconds=1))
        except RuntimeError as error:
            return round(time.monotonic(), 2), str(error)

    assert [when for when, _ in on_ranks(3, body)] == [1.0, 2.0, 1.5]
