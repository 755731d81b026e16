"""Putting what a checkpoint holds into an engine, whatever ZeRO stage and number of ranks wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lightrft.errors import CheckpointError
from lightrft.strategy.deepspeed import masters
from lightrft.strategy.deepspeed.parameters import is_partitioned, own_part, own_partition, shape_of
from lightrft.strategy.deepspeed.pieces import Overlap, Piece, overlaps
from lightrft.strategy.deepspeed.saved import SavedEngine
from lightrft.strategy.utils.agreement import Ranks

__all__ = ["restore"]


def restore(engine: Any, folder: Path, *, strict: bool, optimizer: bool) -> None:
    """Take weights, fp32 masters, buffers and (if asked for) the optimizer's states. *Collective*.

    Args:
        engine: of DeepSpeed. One that does not train takes weights and buffers.
        folder: written by ``writing.write``.
        strict: refuse a checkpoint whose parameters are not those of the model; else take what fits.
        optimizer: also its states, hyper-parameters and loss scale.

    Raises:
        CheckpointError: it is incomplete, damaged, or does not fit, on any rank; nothing is changed then.
    """
    trains = engine.basic_optimizer is not None
    optimizer = optimizer and trains
    failed = "the checkpoint was not loaded"
    with Ranks().together(failed):
        saved = SavedEngine(folder)
        _check(engine, saved, strict=strict, optimizer=optimizer)
        wanted = list(masters.pieces_of(engine)) if trains else []
        todo = list(overlaps(saved.pieces, wanted))
        rest = set(engine.param_names.values()) - (masters.trained_names(engine) if trains else set())
        rest |= {name for name, _ in engine.module.named_buffers()}
        thawed = [piece for piece in wanted if piece.name not in saved.shapes]
        saved.open({overlap.saved[0] for overlap in todo}, rest | {piece.name for piece in thawed})
    with Ranks().together(failed), torch.no_grad():
        if trains:
            masters.free_weights(engine)
            _restore_masters(masters.flat_masters(engine), saved, todo, thawed)
        if optimizer:
            _restore_states(engine, saved, todo, masters.flat_masters(engine))
        _restore_rest(engine, saved, rest)
    if trains:
        masters.give_weights(engine)
    if optimizer:
        _restore_counters(engine, saved)


def _check(engine: Any, saved: SavedEngine, *, strict: bool, optimizer: bool) -> None:
    have = {name: shape_of(parameter) for parameter, name in engine.param_names.items()}
    found = {**saved.shapes, **saved.frozen_shapes()}
    wrong = [
        f"{name} is {tuple(found[name])} there and {tuple(have[name])} here"
        for name in sorted(have.keys() & found.keys())
        if tuple(found[name]) != tuple(have[name])
    ]
    if strict or not have.keys() & found.keys():
        wrong += [f"{name} is missing there" for name in sorted(have.keys() - found.keys())]
        wrong += [f"{name} is not in the model" for name in sorted(found.keys() - have.keys() - _others(engine, saved))]
    if optimizer and not saved.trains:
        raise CheckpointError("the checkpoint holds no optimizer: pass load_optimizer_states=False")
    if optimizer and len(engine.optimizer.param_groups) != len(saved.groups):
        mine = len(engine.optimizer.param_groups)
        wrong.append(f"its optimizer has {len(saved.groups)} parameter groups, and this one {mine}")
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


def _restore_masters(flats: list[torch.Tensor], saved: SavedEngine, todo: list[Overlap], thawed: list[Piece]) -> None:
    """Masters of what was trained when it was saved, and of ``thawed``, which was frozen then if it is there at all."""
    for overlap in todo:
        rank, number, run = overlap.saved
        flat, place = overlap.wanted
        flats[flat][place] = saved.masters(rank)[number][run].to(flats[flat].device)
    known = set(saved.frozen_names)
    for piece in thawed:
        if piece.name in known:
            value = saved.frozen_one(piece.name).reshape(-1)[piece.start : piece.start + piece.length]
            flats[piece.flat][piece.offset : piece.offset + piece.length] = value.to(flats[piece.flat].device)


def _restore_states(engine: Any, saved: SavedEngine, todo: list[Overlap], flats: list[torch.Tensor]) -> None:
    states = engine.optimizer.optimizer.state
    for one in flats:
        states.pop(one, None)  # of later steps, where the checkpoint has none
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


def _restore_rest(engine: Any, saved: SavedEngine, names: set[str]) -> None:
    """Parameters without masters, and buffers, which a converted checkpoint has among the frozen parameters."""
    frozen, buffers = set(saved.frozen_names), set(saved.common["buffer_names"])
    for parameter, name in engine.param_names.items():
        if name in names and (name in frozen or name in saved.shapes):
            value = saved.whole(name) if name in saved.shapes else saved.frozen_one(name)
            if is_partitioned(parameter):
                own_partition(parameter).copy_(own_part(parameter, value))
            else:
                parameter.data.copy_(value)
    for name, buffer in engine.module.named_buffers():
        if name in buffers:
            buffer.copy_(saved.common["module"][name])
        elif name in frozen:
            buffer.copy_(saved.frozen_one(name))


def _restore_counters(engine: Any, saved: SavedEngine) -> None:
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, saved.common[name])
    scaler = saved.optimizer(0)["loss_scaler"]
    if type(scaler) is type(engine.optimizer.loss_scaler):
        engine.optimizer.loss_scaler = scaler
