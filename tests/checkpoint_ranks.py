"""Ranks that save checkpoints into one folder and find them again."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import simulated_ranks

from lightrft.strategy.utils.checkpoints import CheckpointFolder

SIZES = [1, 2, 4]


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    """No test waits for a disk: what would be lost without syncing is told by the faults."""
    monkeypatch.setattr(os, "fsync", os.fstat)


def save(save_dir, tag, value, *, steps=0, **options):
    """Save a checkpoint that holds ``value`` in a file of each rank and in the client state."""
    folder = CheckpointFolder(save_dir)
    options = {"backend": "fsdp", "client_state": {"value": value}, **options}
    with folder.saving(tag, steps=steps, **options) as path:
        (path / "shards").mkdir(exist_ok=True)
        (path / f"shards/{folder.ranks.rank}.bin").write_bytes(bytes([value]) * 1000)


def held(save_dir, tag=None):
    """The value that is found, having looked at every file of it."""
    folder = CheckpointFolder(save_dir)
    path = folder.find(tag)
    value = folder.load_client_state(path)["value"]
    shards = sorted((path / "shards").iterdir())
    assert len(shards) == folder.info(path).world_size
    assert all(shard.read_bytes() == bytes([value]) * 1000 for shard in shards)
    return value


def tags(save_dir):
    return [info.tag for info in CheckpointFolder(save_dir).checkpoints()]


def leftovers(save_dir):
    return sorted(path.name for path in Path(save_dir).iterdir() if path.name.startswith("."))


on_ranks = partial(simulated_ranks.on_ranks, stall_limit=15)


def caught(body):
    """Class and text of the error that ``body()`` raises; ``None`` if it raises none."""
    try:
        body()
    except Exception as error:  # noqa: BLE001 - whatever it is
        return type(error).__name__, str(error)
    return None
