"""What a checkpoint of FSDP2 holds, which is in the format of ``torch.distributed.checkpoint`` (DCP)."""

from __future__ import annotations

import pickle
import warnings
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from lightrft.errors import CheckpointError
from lightrft.strategy.fsdp.fsdp_checkpoint import FOLDER, GROUPS, LOSS_SCALE, MODEL, STATE
from lightrft.strategy.utils.ckpt_scripts.contents import Contents, Place, Spec, settings_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["FSDPContents", "entry_of", "in_one_process"]


def entry_of(place: Place) -> str:
    """Under which name DCP has a tensor."""
    return f"{STATE}{place.name}.{place.key}" if place.key else f"{MODEL}{place.name}"


def _place_of(entry: str) -> Place:
    if entry.startswith(MODEL):
        return Place(entry.removeprefix(MODEL))
    name, _, key = entry.removeprefix(STATE).rpartition(".")
    return Place(name, key)


@contextmanager
def in_one_process() -> Iterator[None]:
    """DCP warns, at every call, that there is one process; here that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _Reader(FileSystemReader):
    """Reads what is known of the files once, not before every tensor."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return self._known

    @cached_property
    def _known(self) -> Metadata:
        return super().read_metadata()


class FSDPContents(Contents):
    """Each tensor is put together from the files of all ranks when it is read.

    Args:
        folder: of the checkpoint.

    Raises:
        CheckpointError: files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / FOLDER
        self._reader = _Reader(str(self._folder))
        known = self._metadata()
        self.specs = {
            _place_of(entry): Spec(tuple(one.size), one.properties.dtype)
            for entry, one in known.items()
            if entry.startswith((MODEL, STATE)) and isinstance(one, TensorStorageMetadata)
        }
        if GROUPS in known:
            groups = self._load(GROUPS, None)
            self.groups = [{**settings_of(group), "params": list(group["params"])} for group in groups]
        self._numbers = self._read_numbers(known)
        if LOSS_SCALE in known:
            value, good_steps = self._load(LOSS_SCALE, torch.zeros(2, dtype=torch.float64)).tolist()
            self.loss_scale = value, int(good_steps)

    def _metadata(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._reader.read_metadata().state_dict_metadata
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError) as error:
            raise CheckpointError(
                f"{self._folder} is no checkpoint in DCP format ({error}): convert another one"
            ) from error
        return found

    def _read_numbers(self, known: dict[str, Any]) -> dict[Place, torch.Tensor]:
        """States that are plain numbers, such as the steps of some optimizers; others than numbers are left out."""
        found = {}
        for entry, one in known.items():
            if entry.startswith(STATE) and not isinstance(one, TensorStorageMetadata):
                value = self._load(entry, None)
                if isinstance(value, int | float):
                    found[_place_of(entry)] = torch.tensor(value, dtype=torch.float32)
        self.specs = {**self.specs, **{place: Spec.of(value) for place, value in found.items()}}
        return found

    def read(self, place: Place) -> torch.Tensor:
        """As in ``Contents``."""
        if place in self._numbers:
            return self._numbers[place]
        spec = self.specs[place]
        found: torch.Tensor = self._load(entry_of(place), torch.empty(spec.shape, dtype=spec.dtype))
        return found

    def _load(self, entry: str, into: torch.Tensor | None) -> Any:
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        entries = {entry: into}
        try:
            with in_one_process():
                load(entries, storage_reader=self._reader, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise self._unreadable(entry, next(iter(error.failures.values()))[0]) from None
        except Exception as error:
            raise self._unreadable(entry, error) from error
        return entries[entry]

    def _unreadable(self, entry: str, error: BaseException) -> CheckpointError:
        kind = type(error).__name__
        return CheckpointError(f"{self._folder}: {entry} cannot be read ({kind}: {error}): convert another checkpoint")
