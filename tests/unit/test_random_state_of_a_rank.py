"""The random state of a rank goes on where it was saved, also in a world of another size."""

from __future__ import annotations

import random

import numpy as np
import pytest
import simulated_ranks
import torch
import torch.distributed as dist

from lightrft.errors import CheckpointError
from lightrft.strategy.utils.checkpoints import CheckpointFolder
from lightrft.strategy.utils.random_state import (
    capture_random_state,
    fingerprints,
    load_random_state,
    reseed,
    restore_random_state,
    save_random_state,
)

GENERATORS = ("torch", "python", "numpy")


def draw():
    """The next numbers of each generator; an odd number of Gaussians, so that one is kept for later."""
    return {
        "torch": torch.randn(3).tolist() + torch.rand(2).tolist(),
        "python": [random.gauss(0, 1), random.random()],
        "numpy": [float(np.random.randn()), float(np.random.rand())],
    }


def seed(value):
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def on_ranks(size, body, **options):
    return simulated_ranks.on_ranks(size, lambda: body(dist.get_rank()), stall_limit=15, **options)


def saved(save_dir, size, seed_of):
    """Save a checkpoint on ``size`` ranks that were seeded so; what each rank draws next, by rank."""

    def body(rank):
        seed(seed_of(rank))
        draw()
        with CheckpointFolder(save_dir).saving("a", backend="fsdp", steps=0):
            pass
        return draw()

    return on_ranks(size, body)


def resumed(save_dir, size, **options):
    """What each rank of a new world draws after it has restored, by rank."""

    def body(rank):
        seed(1000 + rank)
        draw()
        folder = CheckpointFolder(save_dir)
        folder.restore_random_state(folder.find())
        return draw()

    return on_ranks(size, body, **options)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_k14_each_rank_goes_on_with_its_own_random_state(tmp_path, size):
    next_draws = saved(tmp_path, size, lambda rank: 10 + rank)
    for name in GENERATORS:
        assert len({str(each[name]) for each in next_draws}) == size
    assert resumed(tmp_path, size) == next_draws
    assert resumed(tmp_path, size, schedule="random", seed=3) == next_draws


def test_k14_a_rank_alone_goes_on_without_a_process_group(tmp_path):
    seed(5)
    with CheckpointFolder(tmp_path).saving("a", backend="fsdp", steps=0):
        draw()
    expected = draw()
    folder = CheckpointFolder(tmp_path)
    folder.restore_random_state(folder.find())
    assert draw() == expected


@pytest.mark.parametrize(("size", "later"), [(1, 2), (1, 4), (2, 4), (4, 2), (4, 1)])
def test_k14_what_was_the_same_on_all_ranks_is_the_same_at_another_world_size(tmp_path, size, later):
    next_draws = saved(tmp_path, size, lambda _: 10)
    assert resumed(tmp_path, later) == [next_draws[0]] * later


@pytest.mark.parametrize(("size", "later"), [(2, 1), (2, 4), (4, 2)])
def test_k14_what_differed_between_ranks_differs_at_another_world_size_and_is_repeatable(tmp_path, size, later):
    saved(tmp_path / "one", size, lambda rank: 10 + rank)
    saved(tmp_path / "two", size, lambda rank: 20 + rank)
    draws = resumed(tmp_path / "one", later)
    assert draws == resumed(tmp_path / "one", later)
    others = resumed(tmp_path / "two", later) + resumed(tmp_path / "one", 8)
    for name in GENERATORS:
        assert len({str(each[name]) for each in draws + others}) == later * 2 + 8


def test_k14_each_generator_is_judged_by_itself(tmp_path):
    def body(rank):
        seed(10)
        np.random.seed(rank)
        with CheckpointFolder(tmp_path).saving("a", backend="fsdp", steps=0):
            pass
        return draw()

    expected = on_ranks(2, body)[0]
    info = CheckpointFolder(tmp_path).info(tmp_path / "a")
    assert info.same_random_state == ("torch", "python")
    first, second, third, fourth = resumed(tmp_path, 4)
    for each in (first, second, third, fourth):
        assert (each["torch"], each["python"]) == (expected["torch"], expected["python"])
    assert len({str(each["numpy"]) for each in (first, second, third, fourth)}) == 4


@pytest.mark.parametrize(("size", "later"), [(2, 2), (2, 4)])
def test_k14_the_generator_of_a_cuda_device_is_saved_and_restored(tmp_path, size, later):
    def cuda_draw():
        return torch.rand(3, device="cuda").tolist()

    def saving(rank):
        torch.cuda.set_device(rank)
        torch.cuda.manual_seed(10 + rank)
        cuda_draw()
        with CheckpointFolder(tmp_path).saving("a", backend="fsdp", steps=0):
            pass
        return cuda_draw()

    def resuming(rank):
        torch.cuda.set_device(rank)
        cuda_draw()
        folder = CheckpointFolder(tmp_path)
        folder.restore_random_state(folder.find())
        return cuda_draw()

    expected = on_ranks(size, saving, cuda=True)
    drawn = on_ranks(later, resuming, cuda=True)
    assert drawn == on_ranks(later, resuming, cuda=True)
    assert len({str(each) for each in drawn}) == later
    assert (drawn == expected) == (size == later)


def test_k14_a_checkpoint_of_gpus_can_be_restored_without_cuda(tmp_path):
    def saving(rank):
        seed(rank)
        torch.rand(3, device="cuda")
        with CheckpointFolder(tmp_path).saving("a", backend="fsdp", steps=0):
            pass
        return draw()

    expected = on_ranks(2, saving, cuda=True)
    assert "cuda" in torch.load(tmp_path / "a/random_state/rank_00000.pt", weights_only=True)
    assert resumed(tmp_path, 2) == expected
    assert len(resumed(tmp_path, 3)) == 3


def test_k14_saving_and_looking_draw_nothing(tmp_path):
    seed(3)
    expected = draw()
    seed(3)
    folder = CheckpointFolder(tmp_path)
    with folder.saving("a", backend="fsdp", steps=0):
        pass
    folder.load_client_state(folder.find())
    assert draw() == expected


def test_a_captured_state_is_a_copy_and_restores_a_kept_gaussian():
    seed(7)
    np.random.randn()
    random.gauss(0, 1)
    state = capture_random_state()
    expected = draw()
    draw()
    restore_random_state(state)
    assert draw() == expected


def test_equal_states_have_equal_fingerprints_and_others_do_not():
    seed(1)
    first = capture_random_state()
    again = capture_random_state()
    assert fingerprints(first) == fingerprints(again)
    draw()
    later = fingerprints(capture_random_state())
    assert set(later) == set(GENERATORS)
    assert all(later[name] != value for name, value in fingerprints(first).items())


def test_reseeding_depends_on_state_rank_and_world_size():
    seed(1)
    first = capture_random_state()
    seed(2)
    second = capture_random_state()
    drawn = []
    for state in (first, second):
        for rank, world_size in ((0, 2), (1, 2), (1, 3)):
            reseed(state, rank=rank, world_size=world_size)
            drawn.append(draw())
    for name in GENERATORS:
        assert len({str(each[name]) for each in drawn}) == 6


@pytest.mark.parametrize("contents", [b"", b"PK\x03\x04", b"text"])
def test_k14_a_damaged_file_is_named_and_nothing_is_restored(tmp_path, contents):
    save_random_state(tmp_path, 0)
    (tmp_path / "random_state/rank_00000.pt").write_bytes(contents)
    seed(1)
    before = fingerprints(capture_random_state())
    with pytest.raises(CheckpointError, match=r"rank_00000\.pt, the random state of a rank, cannot be read"):
        load_random_state(tmp_path, rank=0, world_size=1, saved_world_size=1, same_on_all_ranks=())
    assert fingerprints(capture_random_state()) == before


def test_k14_a_file_that_is_missing_or_holds_something_else_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"rank_00001\.pt, the random state of a rank, cannot be read"):
        load_random_state(tmp_path, rank=1, world_size=2, saved_world_size=2, same_on_all_ranks=())
    (tmp_path / "random_state").mkdir()
    torch.save([1], tmp_path / "random_state/rank_00000.pt")
    with pytest.raises(CheckpointError, match=r"rank_00000\.pt holds a list, expected the random state of a rank"):
        load_random_state(tmp_path, rank=1, world_size=2, saved_world_size=1, same_on_all_ranks=())
