"""The random state of a rank, saved in a checkpoint and restored from it, also by another number of ranks.

Resumed by as many ranks as saved it, each rank goes on with exactly its own state. At another world size, every
generator (torch, Python, NumPy, CUDA) is taken by itself:

- its state was the same on all ranks when it was saved: all ranks get that state, since a program that draws the same
  on all ranks relies on it;
- it was not: each rank is seeded from the saved state of rank 0, its own rank and the new world size. Ranks differ, and
  every resumption at this size draws the same.
"""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightrft.errors import CheckpointError
from lightrft.strategy.utils.durable_files import write_file

__all__ = [
    "RANDOM_STATES",
    "capture_random_state",
    "fingerprints",
    "load_random_state",
    "random_state_file",
    "reseed",
    "restore_random_state",
    "save_random_state",
]

RANDOM_STATES = "random_state"
"""Folder of the files of all ranks, in that of the checkpoint."""


def random_state_file(rank: int) -> str:
    """Name of the file of a rank, relative to the folder of the checkpoint."""
    return f"{RANDOM_STATES}/rank_{rank:05d}.pt"


def capture_random_state() -> dict[str, Any]:
    """State of the global generators of this rank: ``torch``, ``python``, ``numpy``, and ``cuda`` if it is in use.

    ``cuda`` is the generator of the current device. Everything in it can be loaded with
    ``torch.load(weights_only=True)``.
    """
    numpy: Any = np.random.get_state(legacy=True)  # noqa: NPY002 - it is the global generator that is saved
    name, key, position, has_gauss, gauss = numpy
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(name), key.tolist(), int(position), int(has_gauss), float(gauss)),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Give the global generators the states that :func:`capture_random_state` has found.

    A generator that ``state`` lacks, and CUDA's where there is no CUDA, stay as they are.
    """
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "python" in state:
        random.setstate(state["python"])
    if "numpy" in state:
        name, key, position, has_gauss, gauss = state["numpy"]
        numpy = (name, np.array(key, dtype=np.uint32), position, has_gauss, gauss)
        np.random.set_state(numpy)  # noqa: NPY002 - and restored
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def fingerprints(state: dict[str, Any]) -> dict[str, str]:
    """A short text for each generator; two are equal where the states are."""
    return {name: hashlib.sha256(_text(value)).hexdigest()[:32] for name, value in state.items()}


def reseed(state: dict[str, Any], *, rank: int, world_size: int) -> None:
    """Seed the generators of ``state`` from their states in it, the rank and the world size."""
    seeds = {name: _derived_seed(value, rank, world_size) for name, value in state.items()}
    if "torch" in seeds:
        torch.default_generator.manual_seed(seeds["torch"])
    if "python" in seeds:
        random.seed(seeds["python"])
    if "numpy" in seeds:
        np.random.seed(seeds["numpy"] % 2**32)  # noqa: NPY002 - and seeded
    if "cuda" in seeds and torch.cuda.is_available():
        torch.cuda.manual_seed(seeds["cuda"])


def save_random_state(folder: Path, rank: int) -> dict[str, str]:
    """Write the state of this rank into the folder of a checkpoint; its :func:`fingerprints`."""
    state = capture_random_state()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    file = folder / random_state_file(rank)
    file.parent.mkdir(exist_ok=True)
    write_file(file, buffer.getvalue())
    return fingerprints(state)


def load_random_state(
    folder: Path, *, rank: int, world_size: int, saved_world_size: int, same_on_all_ranks: Sequence[str]
) -> None:
    """Restore the state of this rank from the folder of a checkpoint, as the head of this module says.

    Args:
        folder: the checkpoint.
        rank: place of this rank now.
        world_size: number of ranks now.
        saved_world_size: number of ranks that saved the checkpoint.
        same_on_all_ranks: generators whose state was the same on all of them.

    Raises:
        CheckpointError: the file is missing or damaged; the message names it.
    """
    if world_size == saved_world_size:
        restore_random_state(_read(folder / random_state_file(rank)))
        return
    state = _read(folder / random_state_file(0))
    restore_random_state({name: value for name, value in state.items() if name in same_on_all_ranks})
    others = {name: value for name, value in state.items() if name not in same_on_all_ranks}
    reseed(others, rank=rank, world_size=world_size)


def _read(file: Path) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{file}, the random state of a rank, cannot be read ({type(error).__name__}: {error}): "
            "load another checkpoint"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, expected the random state of a rank")
    return state


def _text(value: Any) -> bytes:
    return repr(value.tolist() if isinstance(value, torch.Tensor) else value).encode()


def _derived_seed(value: Any, rank: int, world_size: int) -> int:
    digest = hashlib.sha256(_text(value) + f" rank {rank} of {world_size}".encode()).digest()
    return int.from_bytes(digest[:7], "little")  # 56 bits: within what every generator takes
