"""Writing a checkpoint of FSDP2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from lightrft.strategy.fsdp.fsdp_checkpoint import FOLDER, GROUPS, LOSS_SCALE
from lightrft.strategy.utils.ckpt_scripts.fsdp_reader import entry_of, in_one_process

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch.distributed.checkpoint.metadata import MetadataIndex

    from lightrft.strategy.utils.ckpt_scripts.contents import Contents, Place
    from lightrft.strategy.utils.ckpt_scripts.progress import Progress

__all__ = ["write"]


class _Planner(DefaultSavePlanner):
    """Plans with tensors that have no storage, reads each when it is written, and frees it before the next.

    DCP keeps every tensor of a file until the file is complete, so it is the storage that is freed.
    """

    def __init__(self, contents: Contents, places: Mapping[str, Place], progress: Progress) -> None:
        super().__init__(flatten_state_dict=False)
        self._contents = contents
        self._places = places
        self._progress = progress
        self._last: torch.Tensor | None = None

    def lookup_object(self, index: MetadataIndex) -> Any:
        place = self._places.get(index.fqn)
        if place is None:
            return super().lookup_object(index)
        self._progress.add(self._contents.specs[place].bytes)
        self.free()
        self._last = self._contents.read(place).clone()
        return self._last

    def free(self) -> None:
        """Free what was read last."""
        if self._last is not None:
            self._last.untyped_storage().resize_(0)
        self._last = None


def write(contents: Contents, folder: Path, progress: Progress) -> None:
    """Write what FSDP2 reads from ``folder``; one tensor at a time is in memory."""
    places = {entry_of(place): place for place in contents.specs}
    entries: dict[str, Any] = {
        entry: torch.empty(contents.specs[place].shape, dtype=contents.specs[place].dtype, device="meta")
        for entry, place in places.items()
    }
    if contents.groups is not None:
        entries[GROUPS] = contents.groups
    if contents.loss_scale is not None:
        entries[LOSS_SCALE] = torch.tensor(contents.loss_scale, dtype=torch.float64)
    writer = FileSystemWriter(str(folder / FOLDER), thread_count=1, per_thread_copy_ahead=0)
    planner = _Planner(contents, places, progress)
    try:
        with in_one_process():
            save(entries, storage_writer=writer, planner=planner, no_dist=True)
    except CheckpointException as error:  # of any rank; there is one
        raise next(iter(error.failures.values()))[0] from None
    finally:
        planner.free()
