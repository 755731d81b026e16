"""The folder layer of checkpoints, the same for every backend and independent of what a backend writes.

Layout::

    save_dir/latest                         text: the tag of the checkpoint to resume from
    save_dir/<tag>/lightrft.json            written last: backend, world size, steps, every file and its size
    save_dir/<tag>/client_state.pt          written once, by rank 0, if there is a client state
    save_dir/<tag>/scheduler.pt             the same
    save_dir/<tag>/random_state/rank_00003.pt
    save_dir/<tag>/...                      what the backend writes

A checkpoint is there as a whole or not at all: see :mod:`lightrft.strategy.utils.checkpoint_store`. All ranks succeed
or fail together, and meet in the same collectives whatever fails on one of them.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.utils.agreement import Ranks, check_same
from lightrft.strategy.utils.checkpoint_info import INFO_FILE, CheckpointInfo, check_tag, read_info
from lightrft.strategy.utils.checkpoint_store import GB, CheckpointStore
from lightrft.strategy.utils.durable_files import write_file
from lightrft.strategy.utils.random_state import (
    RANDOM_STATES,
    load_random_state,
    random_state_file,
    save_random_state,
)

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["CLIENT_STATE", "SCHEDULER", "CheckpointFolder"]

CLIENT_STATE = "client_state.pt"
SCHEDULER = "scheduler.pt"


class CheckpointFolder:
    """The checkpoints in one folder, saved and found by all ranks of a group together.

    Args:
        save_dir: the folder; all ranks have to see the same one, under any name.
        group: the ranks that save and load; ``None`` for the default group, or for one rank without any group.
        rank, world_size: place in the group; read from it where they are not given.
        patience: seconds that a rank waits for what rank 0 has written, since network file systems show it late.

    Raises:
        ConfigError: there are several ranks and no process group.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        group: dist.ProcessGroup | None = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        patience: float = 30.0,
    ) -> None:
        self.save_dir = Path(save_dir).absolute()
        self.ranks = Ranks(group, rank=rank, world_size=world_size)
        self._store = CheckpointStore(self.save_dir)
        self._patience = patience

    # -- saving -------------------------------------------------------------------------------------------------

    @contextmanager
    def saving(
        self,
        tag: str,
        *,
        backend: str,
        steps: int,
        client_state: Mapping[str, Any] | None = None,
        scheduler_state: Any = None,
        max_num: int | None = 3,
        max_mem: float | None = 1000,
        save_latest: bool = True,
    ) -> Iterator[Path]:
        """Save a checkpoint: the ranks write into the folder that this gives, and it becomes ``save_dir/<tag>``.

        Called on all ranks. If the block ends well on all of them, the checkpoint takes its place, the file ``latest``
        names it, and older checkpoints that were written by lightrft are deleted, the oldest first. If something fails
        on a rank, before, in or after the block, every rank raises, and the checkpoints are as before. The random
        state of each rank is that at the end of the block.

        A rank that fails in the block while others wait for it in a collective of the block keeps them waiting: steps
        between collectives are best done in ``folder.ranks.together("...")``.

        Args:
            tag: name of the folder; a checkpoint of lightrft of this name is replaced when the new one is complete.
            backend: who writes the weights.
            steps: optimizer steps until now.
            client_state: what the caller wants back; that of rank 0 is written.
            scheduler_state: ``state_dict()`` of the scheduler, ``None`` without one; that of rank 0 is written.
            max_num: how many checkpoints may be left, the new one included; ``None`` for any number.
            max_mem: GB (10**9 bytes) that they may have together; ``None`` for any. The new one, and the one that
                ``latest`` names, are kept even if they are more.
            save_latest: whether ``latest`` is to name it.

        Raises:
            ConfigError: an argument cannot work, the ranks have passed different ones, or the place is taken by
                something that lightrft did not write.
            CheckpointError: something failed on some rank; that the ranks do not share ``save_dir``, for example.
        """
        failed = f"the checkpoint {tag!r} was not saved in {self.save_dir}"
        states: dict[str, bytes] = {}
        pickled: list[str] = []
        with self.ranks.together(f"nothing was saved in {self.save_dir}") as outcome:
            check_tag(tag)
            _check_limits(steps, max_num, max_mem)
            if self.ranks.rank == 0:
                states, pickled = _serialized(client_state, scheduler_state)
            outcome.mine = {"tag": tag, "backend": backend, "steps": steps, "save_latest": save_latest}
            outcome.mine |= {"max_num": max_num, "max_mem": max_mem}
        check_same(outcome.all, f"nothing was saved in {self.save_dir}")
        path, host = self._begin(tag, failed)
        with self._discarded_on_error(path):
            self._see(path, host, failed)
            with self.ranks.together(failed) as outcome:
                yield path
                outcome.mine = save_random_state(path, self.ranks.rank)
            info = CheckpointInfo(
                tag=tag,
                backend=backend,
                steps=steps,
                save_latest=save_latest,
                world_size=self.ranks.world_size,
                sequence=0,
                saved_at=0.0,
                files={},
                pickled=tuple(pickled),
                same_random_state=_same(outcome.all),
            )
            with self.ranks.together(failed):
                if self.ranks.rank == 0:
                    self._commit(path, info, states)
                    self._store.rotate(tag, max_num=max_num, max_bytes=None if max_mem is None else max_mem * GB)

    def _begin(self, tag: str, failed: str) -> tuple[Path, str]:
        """Rank 0 makes the folder to write into; that folder, and the host of rank 0."""
        with self.ranks.together(failed) as outcome:
            if self.ranks.rank == 0:
                outcome.mine = (self._store.begin(tag).name, socket.gethostname())
        name, host = outcome.all[0]
        return self.save_dir / name, host

    def _commit(self, path: Path, info: CheckpointInfo, states: dict[str, bytes]) -> None:
        for rank in range(info.world_size):
            if not self._appears(path / random_state_file(rank)):
                raise CheckpointError(
                    f"{path} does not show what rank {rank} wrote: save_dir has to be shared by all nodes"
                )
        for name, contents in states.items():
            write_file(path / name, contents)
        self._store.commit(path, info)

    @contextmanager
    def _discarded_on_error(self, path: Path) -> Iterator[None]:
        try:
            yield
        except Exception:  # an interrupt passes on purpose: the process ends at once, and the next save cleans up
            if self.ranks.rank == 0:
                self._store.discard(path)
            raise

    def _see(self, path: Path, host: str, failed: str) -> None:
        """Every rank sees what rank 0 has made."""
        with self.ranks.together(failed):
            if not self._appears(path):
                raise CheckpointError(
                    f"{path}, which rank 0 sees on {host}, is not there on {socket.gethostname()}: save_dir has to "
                    "be a folder on a file system that all nodes share"
                )

    def _appears(self, path: Path) -> bool:
        """Whether something that another rank has made is there, or comes within the time to be patient."""
        deadline = time.monotonic() + self._patience
        while not path.exists():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
            if path.parent.is_dir():
                list(path.parent.iterdir())  # makes a network file system look again
        return True

    # -- loading ------------------------------------------------------------------------------------------------

    def find(self, tag: str | None = None) -> Path:
        """Folder of a complete checkpoint: ``tag``, or the one that ``latest`` names. Called on all ranks.

        Without a file ``latest`` it is the newest one that was saved with ``save_latest=True``. That every file has
        the size that it was saved with is checked.

        Raises:
            ConfigError: the tag cannot be one, or the ranks ask for different ones.
            CheckpointError: there is none, or it is incomplete (the message lists what is there); or a rank does not
                see what rank 0 sees.
        """
        failed = f"no checkpoint was found in {self.save_dir}"
        with self.ranks.together(failed) as outcome:
            if tag is not None:
                check_tag(tag)
            outcome.mine = {"tag": tag}
        check_same(outcome.all, failed)
        with self.ranks.together(failed) as outcome:
            if self.ranks.rank == 0:
                outcome.mine = (self._store.find(tag).name, socket.gethostname())
        name, host = outcome.all[0]
        path: Path = self.save_dir / name
        self._see(path / INFO_FILE, host, failed)
        return path

    def checkpoints(self) -> list[CheckpointInfo]:
        """What the complete checkpoints of this folder say of themselves, oldest first. A rank may call it alone."""
        return self._store.infos()

    def info(self, path: Path) -> CheckpointInfo:
        """What a checkpoint says of itself: its backend, world size and steps, for example. Called on all ranks.

        Raises:
            CheckpointError: its ``lightrft.json`` is missing or damaged.
        """
        with self.ranks.together("the checkpoint was not loaded"):
            return read_info(path)

    def load_client_state(self, path: Path) -> dict[str, Any]:
        """The client state of a checkpoint, tensors on the CPU; empty if it was saved without. Called on all ranks.

        Raises:
            CheckpointError: a file is damaged.
        """
        with self.ranks.together("the client state was not loaded"):
            return dict(_load_state(path, CLIENT_STATE) or {})

    def load_scheduler_state(self, path: Path) -> Any:
        """The state of the scheduler of a checkpoint; ``None`` if it was saved without. Called on all ranks.

        Raises:
            CheckpointError: a file is damaged.
        """
        with self.ranks.together("the state of the scheduler was not loaded"):
            return _load_state(path, SCHEDULER)

    def restore_random_state(self, path: Path) -> None:
        """Restore the random state of this rank; :mod:`lightrft.strategy.utils.random_state` says how. On all ranks.

        That of a checkpoint without any, which was converted from weights alone, leaves all as it is.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        with self.ranks.together("the random state was not restored"):
            info = read_info(path)
            if not any(name.startswith(f"{RANDOM_STATES}/") for name in info.files):
                return
            load_random_state(
                path,
                rank=self.ranks.rank,
                world_size=self.ranks.world_size,
                saved_world_size=info.world_size,
                same_on_all_ranks=info.same_random_state,
            )


def _check_limits(steps: int, max_num: int | None, max_mem: float | None) -> None:
    if type(steps) is not int or steps < 0:
        raise ConfigError(f"steps={steps!r}: expected the number of optimizer steps")
    if max_num is not None and (type(max_num) is not int or max_num < 1):
        raise ConfigError(f"max_num={max_num!r}: expected at least 1, the new checkpoint, or None for no limit")
    if max_mem is not None and (type(max_mem) not in (int, float) or not max_mem > 0):
        raise ConfigError(f"max_mem={max_mem!r}: expected a number of GB above 0, or None for no limit")


def _same(fingerprints: list[dict[str, str]]) -> tuple[str, ...]:
    """Generators whose state is the same on all ranks."""
    first = fingerprints[0]
    return tuple(name for name in first if all(other.get(name) == first[name] for other in fingerprints))


def _serialized(client_state: Mapping[str, Any] | None, scheduler_state: Any) -> tuple[dict[str, bytes], list[str]]:
    """Contents of the files that rank 0 writes, by name; and those of them that need ``weights_only=False``."""
    if client_state is not None and not isinstance(client_state, Mapping):
        raise ConfigError(f"client_state is a {type(client_state).__name__}: expected a mapping, such as a dict")
    states, pickled = {}, []
    client = None if client_state is None else dict(client_state)
    for name, state in {CLIENT_STATE: client, SCHEDULER: scheduler_state}.items():
        if state is None:
            continue
        buffer = io.BytesIO()
        try:
            torch.save(state, buffer)
        except Exception as error:
            raise CheckpointError(
                f"what is to be written to {name} cannot be pickled ({type(error).__name__}: {error}): "
                "pass numbers, texts, tensors, lists and dicts"
            ) from error
        states[name] = buffer.getvalue()
        if not _is_plain(states[name]):
            pickled.append(name)
    return states, pickled


def _is_plain(contents: bytes) -> bool:
    try:
        torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it is that this refuses, it needs pickle
        return False
    return True


def _load_state(path: Path, name: str) -> Any:
    info = read_info(path)
    if name not in info.files:
        return None
    try:
        return torch.load(path / name, map_location="cpu", weights_only=name not in info.pickled)
    except Exception as error:
        raise CheckpointError(
            f"{path / name} cannot be read ({type(error).__name__}: {error}): load another checkpoint"
        ) from error
