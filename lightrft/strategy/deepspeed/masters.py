"""The weights in fp32 that the optimizer of an engine steps, in flat tensors: what of each parameter lies where."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from lightrft.strategy.deepspeed.pieces import Piece, evenly_split

__all__ = ["flat_masters", "free_weights", "give_weights", "pieces_of", "trained_names"]


def trained_names(engine: Any) -> set[str]:
    """Names of the parameters that have masters, on this rank or another."""
    return {engine.param_names[parameter] for group in _groups(engine) for parameter in group}


def _groups(engine: Any) -> list[list[Any]]:
    optimizer = engine.optimizer
    found: list[list[Any]] = optimizer.fp16_groups if engine.zero_optimization_stage() == 3 else optimizer.bit16_groups
    return found


def flat_masters(engine: Any) -> list[torch.Tensor]:
    """The flat tensors of this rank."""
    optimizer = engine.optimizer
    found: list[torch.Tensor] = (
        optimizer.fp32_partitioned_groups_flat
        if engine.zero_optimization_stage() == 3
        else optimizer.single_partition_of_fp32_groups
    )
    return found


def pieces_of(engine: Any) -> Iterator[Piece]:
    """Where in them the parameters lie that are trained."""
    names = engine.param_names
    if engine.zero_optimization_stage() == 3:
        groups = [{names[p]: p.ds_numel for p in group} for group in _groups(engine)]
        yield from evenly_split(groups, torch.distributed.get_rank(), torch.distributed.get_world_size())
        return
    for flat, group in enumerate(_groups(engine)):
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield Piece(name=names[parameter], start=here.start, length=here.numel, flat=flat, offset=there.start)


def free_weights(engine: Any) -> None:
    """Free what is gathered of the weights, before the masters change."""
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.checkpoint_event_prologue()


def give_weights(engine: Any) -> None:
    """Make the weights those of the masters. *Collective*."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
