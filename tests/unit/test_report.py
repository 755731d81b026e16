"""What a user reads when a run fails: one table, the first difference, the seed and the command."""

from __future__ import annotations

import pickle

import pytest
import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError, DeadlockError, RankFailedError
from lightrft.sim import SimWorld
from lightrft.sim.blame import cover, outsiders
from lightrft.sim.divergence import show_ranks

LINE = {}


def mark(name):
    """Remember the line of the caller."""
    import sys

    LINE[name] = sys._getframe(1).f_lineno


def skips_one():
    dist.init_process_group("nccl")
    gradient = torch.ones(16)
    if dist.get_rank() != 3:
        mark("reduce")
        dist.all_reduce(gradient)
    mark("barrier")
    dist.barrier()
    dist.destroy_process_group()


def test_a_mismatch_shows_who_did_what_where_and_how_to_replay():
    with pytest.raises(CollectiveMismatchError) as caught:
        SimWorld(8, seed=5, schedule="random").run(skips_one)
    reduce, barrier = LINE["reduce"] + 1, LINE["barrier"] + 1
    text = str(caught.value).replace(__file__, "test_report.py").replace("tests/unit/", "")
    assert text == (
        f"""mismatch: the operation differs between ranks. Look at rank 3 at test_report.py:{barrier}.

  ranks 0-2, 4-7  waits in all_reduce(float32[16], SUM) on the default group, #1
                    at test_report.py:{reduce} in skips_one
                    > dist.all_reduce(gradient)
  rank 3          waits in barrier() on the default group, #1
                    at test_report.py:{barrier} in skips_one
                    > dist.barrier()

call #1 on the default group:
  ranks 0-2, 4-7  all_reduce(float32[16], SUM)
                    at test_report.py:{reduce} in skips_one
                    > dist.all_reduce(gradient)
  rank 3          barrier()
                    at test_report.py:{barrier} in skips_one
                    > dist.barrier()

seed 5; run it again with: SimWorld(8, seed=5, schedule='random')"""
    )


def test_a_deadlock_names_the_first_call_in_which_the_ranks_differ():
    def run():
        dist.init_process_group("nccl")
        for step in range(3):
            if step == 2 and dist.get_rank() == 1:
                break
            dist.broadcast(torch.ones(2), src=0)
        dist.destroy_process_group()

    with pytest.raises(DeadlockError) as caught:
        SimWorld(4).run(run)
    report = caught.value.report
    assert report.difference_title == "the ranks of the default group differ first in call #3"
    assert [(row.ranks, row.what) for row in report.difference] == [
        ((0, 2, 3), "broadcast(float32[2], root 0)"),
        ((1,), "nothing"),
    ]
    assert [culprit.rank for culprit in report.culprits] == [1]
    assert report.rows[1].what == "has returned; it destroyed the default group"


def test_calls_of_one_kind_from_different_lines_are_told_apart():
    def run():
        dist.init_process_group("nccl")
        if dist.get_rank() != 2:
            dist.all_reduce(torch.ones(2))
        dist.all_reduce(torch.ones(2))
        if dist.get_rank() == 2:
            return
        dist.destroy_process_group()

    with pytest.raises(DeadlockError) as caught:
        SimWorld(4).run(run)
    assert [culprit.rank for culprit in caught.value.report.culprits] == [2]


def test_several_ranks_that_fail_alike_are_one_entry():
    def run():
        dist.init_process_group("nccl")
        if dist.get_rank() != 0:
            raise ValueError("no reward model")
        dist.barrier()

    with pytest.raises(RankFailedError) as caught:
        SimWorld(4).run(run)
    text = str(caught.value)
    assert text.startswith("ranks 1-3 failed: ValueError: no reward model")
    assert text.count("Traceback") == 1
    assert "rank 0     waits in barrier()" in text


@pytest.mark.parametrize("error", [DeadlockError, CollectiveMismatchError])
def test_an_error_survives_the_way_between_processes(error):
    def deadlock():
        dist.init_process_group("nccl")
        if dist.get_rank():
            dist.barrier()

    with pytest.raises(error) as caught:
        SimWorld(3).run(deadlock if error is DeadlockError else mismatch)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.report == caught.value.report


def mismatch():
    dist.init_process_group("nccl")
    dist.all_reduce(torch.ones(2 + (dist.get_rank() == 1)))


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0-1"),
        ([5, 0, 1, 2, 7], "ranks 0-2, 5, 7"),
        (range(1024), "ranks 0-1023"),
    ],
)
def test_ranks_are_shown_as_ranges(ranks, text):
    assert show_ranks(ranks) == text


def test_the_minority_is_outside_and_everybody_is_when_there_is_none():
    assert outsiders({"a": [0, 1, 2], "b": [3]}) == {3}
    assert outsiders({"a": [0], "b": [1]}) == {0, 1}
    assert outsiders({"a": [0, 1]}) == {0, 1}


def test_pairs_are_covered_by_the_ranks_they_share():
    assert cover([(0, 2), (1, 2), (3, 2)]) == {2}
    assert cover([(0, 1)]) == {0, 1}
    assert cover([(0, 1), (0, 2), (4, 5)]) == {0, 4, 5}


def test_a_thousand_ranks_fit_on_a_screen():
    def run():
        dist.init_process_group("nccl")
        if dist.get_rank() != 700:
            dist.barrier()

    with pytest.raises(DeadlockError) as caught:
        SimWorld(1024).run(run)
    text = str(caught.value)
    assert "ranks 0-699, 701-1023" in text
    assert len(text.splitlines()) < 20


def test_a_rank_that_meets_the_others_on_its_way_out_shows_its_exception():
    def run():
        dist.init_process_group("nccl")
        try:
            if dist.get_rank() == 2:
                raise ValueError("no boxed answer")
            dist.all_reduce(torch.ones(2))
        finally:
            dist.barrier()

    with pytest.raises(CollectiveMismatchError, match="barrier.* while handling ValueError: no boxed answer"):
        SimWorld(4).run(run)
