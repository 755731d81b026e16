"""Moving averages of sharded weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from lightrft.errors import ConfigError
from lightrft.strategy.fsdp.fsdp_utils import local, whole

__all__ = ["move_sharded", "move_whole"]


@torch.no_grad()
def move_sharded(
    average: Mapping[str, nn.Parameter], source: Mapping[str, nn.Parameter], *, beta: float, device: torch.device
) -> None:
    """Make ``average`` ``beta * average + (1 - beta) * source``; nothing is gathered if both are sharded alike.

    Args:
        average: sharded parameters by name.
        source: the same names and shapes.
        beta: from 0 to 1.
        device: of this rank.

    Raises:
        ConfigError: the parameters differ, or ``beta`` is out of range.
    """
    _check(average, source, beta)
    for name, target in average.items():
        other: torch.Tensor = source[name].detach()
        if isinstance(target, DTensor) and not _alike(target, other):
            full = whole(other, device)
            other = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
        local(target.detach()).lerp_(local(other).to(local(target)), 1 - beta)


@torch.no_grad()
def move_whole(
    average: nn.Module, source: Mapping[str, nn.Parameter], *, beta: float, on: torch.device, device: torch.device
) -> None:
    """The same for an ``average`` that each rank has whole; one parameter is gathered at a time. *Collective*.

    Args:
        average: a plain module.
        source: its parameters by name, sharded.
        beta: from 0 to 1.
        on: where it is computed.
        device: of this rank.

    Raises:
        ConfigError: the parameters differ, or ``beta`` is out of range.
    """
    targets = dict(average.named_parameters())
    _check(targets, source, beta)
    for name, target in targets.items():
        other = whole(source[name], device).to(on, torch.float32)
        target.copy_(target.detach().to(on, torch.float32).lerp(other, 1 - beta))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        isinstance(one, DTensor)
        and isinstance(other, DTensor)
        and one.device_mesh == other.device_mesh
        and one.placements == other.placements
    )


def _check(average: Mapping[str, nn.Parameter], source: Mapping[str, nn.Parameter], beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta={beta!r}: expected a number from 0 (copy) to 1 (stay)")
    ours, theirs = ({name: one.shape for name, one in each.items()} for each in (average, source))
    if ours != theirs:
        odd = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ConfigError(
            f"moving_average of models with different parameters ({', '.join(odd[:3])}): make the average a copy of the model"
        )
