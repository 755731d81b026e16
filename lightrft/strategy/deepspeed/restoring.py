"""Putting what a checkpoint holds into an engine, whatever ZeRO stage and number of ranks wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightrft.errors import CheckpointError
from lightrft.strategy.deepspeed import masters
from lightrft.strategy.deepspeed.parameters import gathered, shape_of
from lightrft.strategy.deepspeed.pieces import Overlap, overlaps
from lightrft.strategy.deepspeed.saved import SavedEngine

__all__ = ["restore"]


def restore(engine: Any, folder: Path, *, strict: bool, optimizer: bool) -> None:
    """Take weights, fp32 masters, buffers and (if asked for) the optimizer's states. *Collective*.

    Args:
        engine: of DeepSpeed, that trains.
        folder: written by ``engine.save_checkpoint``.
        strict: refuse a checkpoint whose parameters are not those of the model; else take what fits.
        optimizer: also its states, hyper-parameters and loss scale.

    Raises:
        CheckpointError: it is incomplete, or does not fit; nothing is changed then.
    """
    saved = SavedEngine(folder)
    _check(engine, saved, strict=strict, optimizer=optimizer)
    masters.free_weights(engine)
    todo = list(overlaps(saved.pieces, masters.pieces_of(engine)))
    flats = masters.flat_masters(engine)
    with torch.no_grad():
        for overlap in todo:
            rank, number, run = overlap.saved
            flat, place = overlap.wanted
            flats[flat][place] = saved.masters(rank)[number][run].to(flats[flat].device)
        if optimizer:
            _restore_states(engine, saved, todo, flats)
        masters.give_weights(engine)
        _restore_rest(engine, saved)
    if optimizer:
        _restore_counters(engine, saved)


def _check(engine: Any, saved: SavedEngine, *, strict: bool, optimizer: bool) -> None:
    have = {name: shape_of(parameter) for parameter, name in engine.param_names.items()}
    found = {**saved.shapes, **{name: tensor.shape for name, tensor in saved.frozen().items()}}
    wrong = [
        f"{name} is {tuple(found[name])} there and {tuple(have[name])} here"
        for name in sorted(have.keys() & found.keys())
        if tuple(found[name]) != tuple(have[name])
    ]
    if strict or not have.keys() & found.keys():
        wrong += [f"{name} is missing there" for name in sorted(have.keys() - found.keys())]
        wrong += [f"{name} is not in the model" for name in sorted(found.keys() - have.keys() - _others(engine, saved))]
    groups = engine.optimizer.param_groups
    if optimizer and len(groups) != len(saved.groups):
        wrong.append(f"its optimizer has {len(saved.groups)} parameter groups, and this one {len(groups)}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckpointError(
            f"the checkpoint does not fit {type(engine.module).__name__}: {'; '.join(wrong[:8])}{more}"
        )


def _others(engine: Any, saved: SavedEngine) -> set[str]:
    """Names that no parameter is known by: further ones of tied parameters, and those of buffers."""
    tied = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in engine.module.named_buffers()}
    return tied | buffers | set(saved.common["shared_params"] or {})


def _restore_states(engine: Any, saved: SavedEngine, todo: list[Overlap], flats: list[torch.Tensor]) -> None:
    states = engine.optimizer.optimizer.state
    for overlap in todo:
        rank, number, run = overlap.saved
        flat, place = overlap.wanted
        of_flat, elements = flats[flat], saved.masters(rank)[number].numel()
        for key, value in saved.states(rank).get(number, {}).items():
            if torch.is_tensor(value) and value.dim() and value.numel() >= elements:
                if key not in states[of_flat]:
                    states[of_flat][key] = torch.zeros_like(of_flat, dtype=value.dtype)
                states[of_flat][key][place] = value[run].to(of_flat.device)
            else:
                states[of_flat][key] = _counter(value, engine.basic_optimizer)
    for group, known in zip(engine.optimizer.param_groups, saved.groups, strict=True):
        group.update({key: value for key, value in known.items() if key != "params"})
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):
        engine.optimizer._hp_optimizer_states_linked = False


def _counter(value: Any, optimizer: torch.optim.Optimizer) -> Any:
    """A number, such as the count of steps, as ``optimizer`` keeps it: PyTorch's in tensors, DeepSpeed's as it is."""
    if type(optimizer).__module__.startswith("torch.optim"):
        return value.clone() if torch.is_tensor(value) else torch.tensor(float(value))
    return int(value) if torch.is_tensor(value) else value


def _restore_rest(engine: Any, saved: SavedEngine) -> None:
    """Frozen parameters and buffers. A converted checkpoint may have them together, or frozen ones with the trained."""
    rest, trained = {**saved.frozen(), **saved.buffers()}, saved.shapes
    for parameter, name in engine.param_names.items():
        if not parameter.requires_grad and (name in rest or name in trained):
            with gathered([parameter], written_by=0):
                parameter.data.copy_(rest[name] if name in rest else saved.whole(name))
    for name, buffer in engine.module.named_buffers():
        if name in rest:
            buffer.copy_(rest[name])


def _restore_counters(engine: Any, saved: SavedEngine) -> None:
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, saved.common[name])
    scaler = saved.optimizer(0)["loss_scaler"]
    if type(scaler) is type(engine.optimizer.loss_scaler):
        engine.optimizer.loss_scaler = scaler
