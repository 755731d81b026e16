"""What is in a checkpoint beside the model: client state and scheduler."""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.distributed as dist
from checkpoint_ranks import (
    SIZES,
    caught,
    held,
    leftovers,
    on_ranks,
    quick_disk,  # noqa: F401 - a fixture of every test
    save,
    tags,
)

from lightrft.errors import CheckpointError, RankFailedError
from lightrft.strategy.utils.checkpoint_store import CheckpointStore
from lightrft.strategy.utils.checkpoints import CheckpointFolder


class Settings:
    """An object that only pickle can bring back."""

    def __init__(self, rate):
        self.rate = rate


@pytest.mark.parametrize("size", SIZES)
def test_k14_client_state_and_scheduler_are_written_once_and_come_back_on_every_rank(tmp_path, size):
    weight = torch.nn.Parameter(torch.ones(1))

    def body():
        scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD([weight], lr=0.5), 3)
        state = {"samples": 7, "name": "x", "nested": {"t": torch.arange(3), "list": [1, None, 2.5]}}
        folder = CheckpointFolder(tmp_path)
        settings = {"client_state": state, "scheduler_state": scheduler.state_dict()}
        with folder.saving("a", backend="fsdp", steps=0, **settings):
            pass
        path = folder.find()
        return folder.load_client_state(path), folder.load_scheduler_state(path)

    for client, scheduler in on_ranks(size, body):
        assert torch.equal(client["nested"].pop("t"), torch.arange(3))
        assert client == {"samples": 7, "name": "x", "nested": {"list": [1, None, 2.5]}}
        assert scheduler["step_size"] == 3
        assert scheduler["base_lrs"] == [0.5]
    info = CheckpointFolder(tmp_path).checkpoints()[0]
    assert sorted(name for name in info.files if "/" not in name) == ["client_state.pt", "scheduler.pt"]
    assert info.pickled == ()


def test_k14_the_client_state_of_rank_0_is_the_one_that_is_written(tmp_path):
    def body():
        rank = dist.get_rank()
        folder = CheckpointFolder(tmp_path)
        with folder.saving("a", backend="fsdp", steps=0, client_state={"rank": rank}):
            pass
        return folder.load_client_state(folder.find())

    assert on_ranks(2, body) == [{"rank": 0}] * 2


def test_k14_without_client_state_and_scheduler_nothing_is_written_for_them(tmp_path):
    save(tmp_path, "a", 1, client_state=None)
    folder = CheckpointFolder(tmp_path)
    assert folder.load_client_state(folder.find()) == {}
    assert folder.load_scheduler_state(folder.find()) is None
    assert not list(tmp_path.glob("a/*.pt"))


def test_k14_objects_that_need_pickle_come_back_and_are_marked(tmp_path):
    args = argparse.Namespace(rate=3)
    save(tmp_path, "a", 1, client_state={"args": args}, scheduler_state={"rate": 1})
    folder = CheckpointFolder(tmp_path)
    assert folder.load_client_state(folder.find()) == {"args": args}
    assert folder.info(folder.find()).pickled == ("client_state.pt",)
    assert folder.load_scheduler_state(folder.find()) == {"rate": 1}


def test_k14_a_file_that_was_saved_plain_is_never_unpickled(tmp_path):
    save(tmp_path, "a", 1)
    torch.save({"args": argparse.Namespace()}, tmp_path / "a/client_state.pt")
    with pytest.raises(CheckpointError, match=r"client_state\.pt cannot be read"):
        CheckpointFolder(tmp_path).load_client_state(tmp_path / "a")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["client_state", "scheduler_state"])
def test_k14_a_state_that_cannot_be_pickled_is_an_error_before_anything_is_written(tmp_path, size, name):
    def body():
        state = {name: {"f": lambda: 1}}
        return caught(lambda: save(tmp_path / "new", "a", 1, **state))

    errors = on_ranks(size, body)
    assert errors == [errors[0]] * size
    assert errors[0] is not None
    assert errors[0][0] == "CheckpointError"
    file = "client_state.pt" if name == "client_state" else "scheduler.pt"
    assert f"what is to be written to {file} cannot be pickled" in errors[0][1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["client_state.pt", "scheduler.pt"])
def test_k14_a_damaged_state_is_named(tmp_path, name):
    save(tmp_path, "a", 1, scheduler_state={"rate": 1})
    (tmp_path / "a" / name).write_bytes(b"nothing")
    folder = CheckpointFolder(tmp_path)
    load = folder.load_client_state if name == "client_state.pt" else folder.load_scheduler_state
    with pytest.raises(CheckpointError, match=f"{name} cannot be read"):
        load(tmp_path / "a")


def test_the_store_can_be_used_by_a_script_without_ranks(tmp_path):
    save(tmp_path, "a", 1)
    assert CheckpointStore(tmp_path).find(None) == tmp_path / "a"


def test_an_interrupt_is_not_made_an_error_of_the_checkpoint(tmp_path):
    folder = CheckpointFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt), folder.saving("a", backend="fsdp", steps=0):
        raise KeyboardInterrupt
    assert tags(tmp_path) == []
    save(tmp_path, "a", 1)
    assert leftovers(tmp_path) == []


def test_rank_failures_outside_of_the_block_stay_what_they_are(tmp_path):
    def body():
        save(tmp_path, "a", 1)
        raise ZeroDivisionError

    with pytest.raises(RankFailedError):
        on_ranks(2, body)
    assert held(tmp_path) == 1
