"""Experiences, and how they are dealt out to optimizer steps."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.trainer.experience import Experience, join_images, padded
from lightrft.trainer.replay_buffer import ReplayBuffer

OF_TOKENS = (
    "log_probs", "engine_log_probs", "initial_log_probs", "entropy", "chosen", "values", "advantages", "returns",
)  # fmt: skip


def experience(lengths, first=0, images=False):
    """A batch whose sequence ``i`` has ``lengths[i]`` tokens, all of them ``first + i``."""
    length = max(lengths)
    rows = [[first + place] * each for place, each in enumerate(lengths)]
    tokens = padded(rows, length, torch.float32)[:, 1:]
    return Experience(
        sequences=padded(rows, length, torch.int64),
        attention_mask=padded([[1] * each for each in lengths], length, torch.int64),
        action_mask=padded([[1] * (each - 1) for each in lengths], length - 1, torch.bool),
        rewards=torch.arange(first, first + len(lengths)).float(),
        images=tuple({"pixels": torch.full((1, 2), first + i)} for i in range(len(lengths))) if images else (),
        **dict.fromkeys(OF_TOKENS, tokens),
    )


def equal(one, other):
    for each in dataclasses.fields(Experience):
        mine, others = getattr(one, each.name), getattr(other, each.name)
        if each.name == "images":
            assert [set(i) for i in mine] == [set(i) for i in others]
        else:
            torch.testing.assert_close(mine, others, equal_nan=True)


def test_a_row_has_no_padding_and_joined_rows_are_the_batch():
    batch = experience([3, 5, 2], images=True)
    rows = [batch.row(place) for place in range(3)]
    assert [row.sequences.tolist() for row in rows] == [[[0] * 3], [[1] * 5], [[2] * 2]]
    assert [row.log_probs.shape for row in rows] == [(1, 2), (1, 4), (1, 1)]
    equal(Experience.joined(rows), batch)
    assert join_images(Experience.joined(rows).images)["pixels"].tolist() == [[0, 0], [1, 1], [2, 2]]


def test_what_is_not_there_stays_away():
    batch = dataclasses.replace(experience([3, 2]), values=None)
    assert Experience.joined([batch.row(0), batch.row(1)]).values is None
    assert batch.images == ()


def test_a_placeholder_has_nothing_to_learn_from_and_joins_the_others():
    found = Experience.placeholder()
    assert not found.action_mask.any()
    assert found.attention_mask.all()
    assert len(Experience.joined([found, experience([4])])) == 2


def test_an_experience_moves_with_its_images():
    found = experience([2], images=True).to("meta")
    assert {found.sequences.device.type, found.images[0]["pixels"].device.type} == {"meta"}


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 4), max_size=4), micro=st.integers(1, 3), many=st.integers(1, 3),
    more=st.integers(0, 1), seed=st.integers(0, 5),
)  # fmt: skip
def test_k11_every_sequence_comes_once_and_every_step_is_full(sizes, micro, many, more, seed):
    buffer = ReplayBuffer()
    buffer.extend(experience([2 + place % 3 for place in range(size)], 100 * i) for i, size in enumerate(sizes))
    count = buffer.steps_needed(micro, many) + more
    steps = buffer.steps(count, micro_batch_size=micro, micro_batches=many, seed=seed)
    assert [len(step) for step in steps] == [many] * count
    batches = [batch for step in steps for batch in step]
    assert all(1 <= len(batch) <= micro for batch in batches)
    real = [batch for batch in batches if batch.action_mask.any()]
    assert len(real) == -(-len(buffer) // micro)
    found = [reward for batch in real for reward in batch.rewards.tolist()]
    assert sorted(found) == [100.0 * i + place for i, size in enumerate(sizes) for place in range(size)]


def test_the_order_follows_from_the_seed():
    buffer = ReplayBuffer()
    buffer.extend([experience([2] * 20)])

    def order(seed):
        (step,) = buffer.steps(1, micro_batch_size=20, micro_batches=1, seed=seed)
        return step[0].rewards.tolist()

    assert order(1) == order(1) != order(2)


def test_a_cleared_buffer_is_empty():
    buffer = ReplayBuffer()
    buffer.extend([experience([2, 2])])
    buffer.clear()
    assert (len(buffer), buffer.steps_needed(1, 1)) == (0, 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_rows_are_padded_at_their_ends(dtype):
    assert padded([[1], [2, 3]], 3, dtype).tolist() == [[1, 0, 0], [2, 3, 0]]
