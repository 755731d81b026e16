"""Weights and optimizer states in the format of ``torch.distributed.checkpoint`` (DCP), by parameter name.

Entries of a checkpoint::

    model.<name>                     weights and persistent buffers: fp32 masters in place of 16-bit parameters
    optimizer.state.<name>.<key>     states of the optimizer
    optimizer.groups                 its groups: names of parameters, and settings
    loss_scale                       of fp16: value, good steps

Names are those of the model before it was sharded. A tied parameter is written once, under its first name.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from lightrft.errors import CheckpointError
from lightrft.strategy.utils.saving import persistent_buffers

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = [
    "FOLDER",
    "GROUPS",
    "LOSS_SCALE",
    "MODEL",
    "STATE",
    "empty_optimizer_entries",
    "fitting",
    "load",
    "model_entries",
    "optimizer_entries",
    "read_metadata",
    "save",
    "set_optimizer",
]

FOLDER = "dcp"
"""Where DCP writes, in the folder of a checkpoint."""

MODEL, STATE, GROUPS, LOSS_SCALE = "model.", "optimizer.state.", "optimizer.groups", "loss_scale"
"""How names of entries begin, or what they are."""


def save(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write ``entries`` below ``folder``. *Collective*."""
    planner = DefaultSavePlanner(flatten_state_dict=False)
    try:
        dcp_save(dict(entries), checkpoint_id=str(folder / FOLDER), planner=planner)
    except CheckpointException as error:  # not an Exception: it would pass by everything that cleans up
        raise CheckpointError(f"{folder} was not written: {error}") from error


def read_metadata(folder: Path) -> dict[str, Any]:
    """What each entry below ``folder`` is, without reading it.

    Raises:
        CheckpointError: there is nothing that ``save`` wrote.
    """
    try:
        found: dict[str, Any] = FileSystemReader(str(folder / FOLDER)).read_metadata().state_dict_metadata
    except (OSError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder} holds no checkpoint in DCP format ({error}): convert it, or name a folder that FSDP wrote"
        ) from error
    return found


def load(folder: Path, entries: dict[str, Any]) -> None:
    """Read ``entries``: tensors in place, other values into the dict. *Collective*."""
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        dcp_load(entries, checkpoint_id=str(folder / FOLDER), planner=planner)
    except CheckpointException as error:
        raise CheckpointError(f"{folder} was not read: {error}") from error


# -- Weights ----------------------------------------------------------------------------------------------------------


def model_entries(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """Weights and persistent buffers of ``module``, as they are kept; ``parameters`` are its parameters by name."""
    entries = {name: value.detach() for name, value in parameters.items()} | persistent_buffers(module)
    return {MODEL + name: value for name, value in entries.items()}


def fitting(entries: dict[str, Any], metadata: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """The ``entries`` that a checkpoint holds.

    Raises:
        CheckpointError: a shape differs; with ``strict``, one is missing or there are others.
    """
    saved = {name: value for name, value in metadata.items() if name.startswith(MODEL)}
    problems = []
    if strict:
        problems += [f"missing: {name.removeprefix(MODEL)}" for name in entries if name not in saved]
        problems += [f"unexpected: {name.removeprefix(MODEL)}" for name in saved if name not in entries]
    for name, value in entries.items():
        if name in saved and isinstance(value, torch.Tensor) and tuple(saved[name].size) != tuple(value.shape):
            problems.append(f"{name.removeprefix(MODEL)}: shape {tuple(saved[name].size)}, not {tuple(value.shape)}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the checkpoint is of another model ({'; '.join(problems[:5])}{more}): build the model that was saved"
            + (", or pass load_module_strict=False" if strict else "")
        )
    return {name: value for name, value in entries.items() if name in saved}


# -- Optimizer --------------------------------------------------------------------------------------------------------


def optimizer_entries(optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> dict[str, Any]:
    """States and groups of ``optimizer``; ``names`` are the names of the parameters it steps."""
    entries: dict[str, Any] = {
        f"{STATE}{names[parameter]}.{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    entries[GROUPS] = [{**group, "params": [names[one] for one in group["params"]]} for group in optimizer.param_groups]
    return entries


def empty_optimizer_entries(metadata: Mapping[str, Any], names: Mapping[torch.Tensor, str]) -> dict[str, Any]:
    """Where the optimizer entries of a checkpoint are read into, sharded like the parameters that they belong to.

    Raises:
        CheckpointError: it was saved without an optimizer.
    """
    if GROUPS not in metadata:
        raise CheckpointError("the checkpoint holds no optimizer: pass load_optimizer_states=False")
    entries: dict[str, Any] = {GROUPS: None}
    for parameter, name in names.items():
        prefix = f"{STATE}{name}."
        for entry in _below(metadata, prefix):
            entries[entry] = _empty(metadata[entry], parameter)
    return entries


def _below(metadata: Mapping[str, Any], prefix: str) -> list[str]:
    return [entry for entry in metadata if entry.startswith(prefix) and "." not in entry[len(prefix) :]]


def _empty(saved: Any, parameter: torch.Tensor) -> Any:
    if not isinstance(saved, TensorStorageMetadata):
        return None
    if isinstance(parameter, DTensor) and tuple(saved.size) == tuple(parameter.shape):
        return torch.zeros_like(parameter.detach(), dtype=saved.properties.dtype, requires_grad=False)
    return torch.zeros(saved.size, dtype=saved.properties.dtype)


def set_optimizer(optimizer: Optimizer, entries: Mapping[str, Any], names: Mapping[torch.Tensor, str]) -> None:
    """Put what was read into ``optimizer``, whose groups may hold other parameters together than those saved."""
    order = [one for group in optimizer.param_groups for one in group["params"]]
    saved = {name: group for group in entries[GROUPS] for name in group["params"]}
    state: dict[int, dict[str, Any]] = {}
    for index, parameter in enumerate(order):
        prefix = f"{STATE}{names[parameter]}."
        found = {entry[len(prefix) :]: entries[entry] for entry in _below(entries, prefix)}
        if found:
            state[index] = found
    groups, first = [], 0
    for group in optimizer.param_groups:
        count = len(group["params"])
        settings = saved.get(names[group["params"][0]], group) if count else group
        groups.append({**group, **settings, "params": list(range(first, first + count))})
        first += count
    optimizer.load_state_dict({"state": state, "param_groups": groups})
