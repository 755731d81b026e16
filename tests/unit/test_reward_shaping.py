"""What is done to rewards before advantages are computed of them."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.strategy import get_strategy
from lightrft.trainer.aggregation import data_parallel_sum
from lightrft.trainer.shaping import RunningMoments, clip_rewards, informative_groups, overlong_penalty

NUMBERS = st.floats(-100, 100, width=32)


def alone(sums):
    return sums


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(NUMBERS, max_size=5), max_size=5))
def test_running_moments_are_those_of_all_rewards(batches):
    moments = RunningMoments()
    for batch in batches:
        moments.update(torch.tensor(batch), alone)
    every = torch.tensor([reward for batch in batches for reward in batch], dtype=torch.float64)
    assert moments.count == len(every)
    if len(every):
        assert moments.mean == pytest.approx(every.mean().item(), abs=1e-6)
        assert moments.deviation == pytest.approx(every.std(correction=0).item(), abs=1e-5)


def test_running_moments_by_hand():
    moments = RunningMoments()
    assert moments.normalised(torch.tensor([2.0])).tolist() == [2.0]
    moments.update(torch.tensor([1.0, 3.0]), alone)
    moments.update(torch.tensor([]), alone)
    moments.update(torch.tensor([torch.nan, 5.0, torch.inf]), alone)
    assert (moments.mean, moments.deviation) == (3.0, pytest.approx((8 / 3) ** 0.5))
    assert moments.normalised(torch.tensor([3.0, 5.0])).tolist() == pytest.approx([0.0, 2 / (8 / 3) ** 0.5])


def test_running_moments_go_on_from_a_checkpoint():
    first, second = RunningMoments(), RunningMoments()
    first.update(torch.tensor([1.0, 2.0, 9.0]), alone)
    second.load_state_dict(first.state_dict())
    for each in (first, second):
        each.update(torch.tensor([4.0, -3.0]), alone)
    assert first.state_dict() == second.state_dict()


def test_k11_running_moments_are_those_of_all_ranks():
    def program():
        strategy = get_strategy({"strategy": "fake", "train_batch_size": 4, "sp_size": 2})
        moments = RunningMoments()
        rewards = [torch.tensor([]), torch.tensor([1.0, 2.0, 6.0])][strategy.groups.dp_rank]
        moments.update(rewards, data_parallel_sum(strategy))
        dist.destroy_process_group()
        return moments.state_dict()

    assert SimWorld(4).run(program) == [{"count": 3.0, "mean": 3.0, "squares": 14.0}] * 4


def test_clipping_by_hand():
    rewards = torch.tensor([-3.0, 0.5, 3.0])
    assert clip_rewards(rewards, 1.0).tolist() == [-1.0, 0.5, 1.0]
    assert torch.equal(clip_rewards(rewards, 0.0), rewards)


def test_the_overlong_penalty_by_hand():
    lengths = torch.tensor([0, 6, 7, 8, 10, 12])
    assert overlong_penalty(lengths, 10, 4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert overlong_penalty(lengths, 10, 4, 2.0).tolist() == [0.0, 0.0, -0.5, -1.0, -2.0, -2.0]
    assert overlong_penalty(lengths, 10, 0).eq(0).all()
    with pytest.raises(ConfigError, match="overlong_buffer_len=11 is larger than generate_max_len=10"):
        overlong_penalty(lengths, 10, 11)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 30), st.integers(1, 20), st.integers(1, 20))
def test_the_overlong_penalty_is_its_equation(length, longest, buffer):
    buffer = min(buffer, longest)
    if length <= longest - buffer:
        expected = 0.0
    elif length <= longest:
        expected = (longest - buffer - length) / buffer
    else:
        expected = -1.0
    assert overlong_penalty(torch.tensor([length]), longest, buffer).item() == pytest.approx(expected)


def test_groups_whose_rewards_are_all_alike_are_left_out():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    assert informative_groups(rewards, 2).tolist() == [False, False, True, True, False, False]
    assert informative_groups(rewards, 3).tolist() == [True] * 6
    assert informative_groups(torch.tensor([]), 2).tolist() == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 1), min_size=3, max_size=3), max_size=5))
def test_a_group_stays_if_two_of_its_rewards_differ(groups):
    rewards = torch.tensor([float(reward) for group in groups for reward in group])
    expected = [len(set(group)) > 1 for group in groups for _ in group]
    assert informative_groups(rewards, 3).tolist() == expected
