"""What a checkpoint folder of FakeStrategy holds: the files that the mirrored backend writes.

Both layouts load at any number of ranks: a flat buffer is cut into parts of equal size, so that parts joined in the
order of ranks and cut anew are the parts of another world.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from lightrft.errors import CheckpointError
from lightrft.sim import fake_settings
from lightrft.strategy.fsdp.fsdp_checkpoint import FOLDER, GROUPS, LOSS_SCALE, MODEL, STATE
from lightrft.strategy.utils.agreement import Ranks

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightrft.sim.flat_parameters import FlatParameters, Piece
    from lightrft.strategy.backend_strategy import Loading
    from lightrft.strategy.prepared import Prepared

__all__ = ["LAYOUTS", "Layout"]


class Layout(Protocol):
    """How one backend lays out a checkpoint folder."""

    def write(self, prepared: Prepared, flat: list[FlatParameters], folder: Path, rank: int) -> None:
        """Write model and optimizer. *Collective*."""

    def read(self, prepared: Prepared, flat: list[FlatParameters], folder: Path, loading: Loading) -> None:
        """Take model and optimizer. *Collective*."""


class DeepSpeedLayout:
    """One file with the weights, written by rank 0, and one file of each rank with its part of the optimizer."""

    model_file = "mp_rank_00_model_states.pt"

    @staticmethod
    def _rank_file(rank: int) -> str:
        return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"

    def write(self, prepared: Prepared, flat: list[FlatParameters], folder: Path, rank: int) -> None:
        """Write model and optimizer."""
        if rank == 0:
            torch.save({"module": prepared.module.state_dict()}, folder / self.model_file)
        optimizer = prepared.optimizer
        states = {
            "parts": [optimizer_part(optimizer, one) for one in flat],
            "groups": None if optimizer is None else fake_settings.settings(optimizer),
            "loss_scale": fake_settings.loss_scale(prepared),
        }
        torch.save(states, folder / self._rank_file(rank))

    def read(self, prepared: Prepared, flat: list[FlatParameters], folder: Path, loading: Loading) -> None:
        """Take model and optimizer."""
        optimizer = prepared.optimizer if loading.optimizer else None
        ranks: list[dict[str, Any]] = []
        with Ranks().together("the checkpoint was not loaded"):
            if optimizer is not None:
                ranks = [_load(path) for path in self._rank_files(folder)]
                groups = fake_settings.by_order(optimizer, _some_groups(ranks[0]["groups"]))
            _load_module(prepared.module, _load(folder / self.model_file)["module"], strict=loading.strict)
        for index, one in enumerate(flat):
            one.adopt_weights()
            if optimizer is not None:
                take_states(optimizer, one, joined([rank["parts"][index] for rank in ranks]))
        if optimizer is not None:
            _take_settings(prepared, groups, ranks[0]["loss_scale"])

    def _rank_files(self, folder: Path) -> list[Path]:
        ranks = itertools.takewhile(
            lambda path: path.is_file(), (folder / self._rank_file(r) for r in itertools.count())
        )
        found = list(ranks)
        if not found:
            raise CheckpointError(f"{folder} holds no optimizer states: load with load_optimizer_states=False")
        return found


class FSDPLayout:
    """The format of ``torch.distributed.checkpoint``, with the entries that ``FSDPV2Strategy`` writes."""

    def write(self, prepared: Prepared, flat: list[FlatParameters], folder: Path, rank: int) -> None:  # noqa: ARG002
        """Write model and optimizer."""
        entries: dict[str, Any] = {f"{MODEL}{name}": value for name, value in prepared.module.state_dict().items()}
        for one in flat:
            for name, states in joined(Ranks().gather(optimizer_part(prepared.optimizer, one))).items():
                entries |= {f"{STATE}{name}.{kind}": value for kind, value in states.items()}
        if prepared.optimizer is not None:
            entries[GROUPS] = fake_settings.named_groups(prepared.optimizer, flat, Ranks())
        if (scale := fake_settings.loss_scale(prepared)) is not None:
            entries[LOSS_SCALE] = scale
        planner = DefaultSavePlanner(flatten_state_dict=False)
        save(entries, checkpoint_id=folder / FOLDER, planner=planner, no_dist=not dist.is_initialized())

    def read(self, prepared: Prepared, flat: list[FlatParameters], folder: Path, loading: Loading) -> None:
        """Take model and optimizer."""
        optimizer = prepared.optimizer if loading.optimizer else None
        with Ranks().together("the checkpoint was not loaded"):
            entries = _read_dcp(folder / FOLDER)
            saved = [] if optimizer is None else _some_groups(entries.get(GROUPS))
            module = {name.removeprefix(MODEL): value for name, value in entries.items() if name.startswith(MODEL)}
            _load_module(prepared.module, module, strict=loading.strict)
        for one in flat:
            one.adopt_weights()
            if optimizer is not None:
                take_states(optimizer, one, _by_parameter(entries, [piece.name for piece in one.pieces]))
        if optimizer is not None:
            here = fake_settings.named_groups(optimizer, flat, Ranks())
            _take_settings(prepared, fake_settings.by_name(here, saved), entries.get(LOSS_SCALE))


def _some_groups(saved: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    if saved is None:
        raise CheckpointError("the checkpoint holds no optimizer: pass load_optimizer_states=False")
    return saved


def _take_settings(prepared: Prepared, groups: list[dict[str, Any]], scale: torch.Tensor | None) -> None:
    if prepared.optimizer is not None:
        for group, saved in zip(prepared.optimizer.param_groups, groups, strict=True):
            group.update(saved)
    fake_settings.set_loss_scale(prepared, scale)


def _by_parameter(entries: dict[str, Any], names: list[str]) -> dict[str, dict[str, Any]]:
    """The states of each parameter, of those that the checkpoint has any of."""
    states: dict[str, dict[str, Any]] = {}
    for entry, value in entries.items():
        name, _, kind = entry.removeprefix(STATE).rpartition(".")
        if entry.startswith(STATE) and name in names:
            states.setdefault(name, {})[kind] = value
    return states


LAYOUTS: dict[str, Layout] = {"deepspeed": DeepSpeedLayout(), "fsdp": FSDPLayout()}


def _read_dcp(folder: Path) -> dict[str, Any]:
    """All that is in ``folder``, whole, whatever number of ranks wrote it."""
    state: dict[str, Any] = {}
    try:
        reader = FileSystemReader(folder)
        _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is incomplete, or of another backend: {error}") from error
    return state


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, or of another backend") from None


def _load_module(module: nn.Module, state: dict[str, torch.Tensor], *, strict: bool) -> None:
    try:
        module.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        raise CheckpointError(f"the checkpoint does not fit the model: {error}") from error


# -- The optimizer's states -------------------------------------------------------------------------------------------
# A *part* is what one rank keeps: the elements of its masters and states in the order of the flat buffer, and whatever
# is kept once for a parameter, such as the number of steps. Parts of all ranks are *joined* to states by name.

MASTER = "master"


def optimizer_part(optimizer: Optimizer | None, flat: FlatParameters) -> dict[str, Any]:
    """What this rank keeps of ``flat``."""
    states = {
        piece.name: dict(optimizer.state.get(piece.master, {})) if optimizer is not None else {}
        for piece in flat.pieces
    }
    kinds = sorted({kind for state in states.values() for kind, value in state.items() if _is_elementwise(value)})
    elements = {kind: torch.cat([_elements(states, piece, kind) for piece in flat.pieces]) for kind in kinds}
    once = {
        name: {kind: value for kind, value in state.items() if not _is_elementwise(value)}
        for name, state in states.items()
    }
    shapes = {piece.name: list(piece.parameter.shape) for piece in flat.pieces}
    elements = {MASTER: flat.masters.detach().float().clone(), **elements}
    return {"elements": elements, "once": once, "shapes": shapes, "stated": [name for name in states if states[name]]}


def _is_elementwise(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _elements(states: dict[str, dict[str, Any]], piece: Piece, kind: str) -> torch.Tensor:
    found = states[piece.name].get(kind)
    return torch.zeros_like(piece.master, requires_grad=False) if found is None else found.reshape(-1)


def joined(parts: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """States by parameter name: tensors in the shape of the parameter, and what is kept once."""
    shapes: dict[str, list[int]] = parts[0]["shapes"]
    states: dict[str, dict[str, Any]] = {name: {} for name in shapes}
    for part in parts:
        for name, once in part["once"].items():
            states[name] |= once
    stated = {name for part in parts for name in part["stated"]}
    for kind in {kind: None for part in parts for kind in part["elements"]}:
        flat = torch.cat([_padded(part, kind) for part in parts])
        offset = 0
        for name, shape in shapes.items():
            length = math.prod(shape)
            if kind == MASTER or name in stated:
                states[name][kind] = flat[offset : offset + length].view(shape)
            offset += length
    return states


def _padded(part: dict[str, Any], kind: str) -> torch.Tensor:
    """The elements of a part; those of the last rank end before the part does, and a rank may have none of a kind."""
    masters: torch.Tensor = part["elements"][MASTER]
    elements: torch.Tensor = part["elements"].get(kind, masters[:0])
    missing = masters.numel() - elements.numel()
    return torch.cat([elements, elements.new_zeros(missing)]) if missing else elements


def take_states(optimizer: Optimizer | None, flat: FlatParameters, states: dict[str, dict[str, Any]]) -> None:
    """Give the optimizer this rank's part of ``states``.

    Raises:
        CheckpointError: they are of other parameters.
    """
    missing = [piece.name for piece in flat.pieces if piece.name not in states]
    if missing:
        raise CheckpointError(f"the checkpoint has no optimizer states of {', '.join(missing[:5])}")
    for piece in flat.pieces:
        kept = {
            kind: piece.of(value).clone() if _is_elementwise(value) else value
            for kind, value in states[piece.name].items()
        }
        with torch.no_grad():
            piece.master.copy_(kept.pop(MASTER))
        if optimizer is not None:
            optimizer.state.pop(piece.master, None)
            if kept and piece.master.numel():
                optimizer.state[piece.master] = kept
    flat.publish()
