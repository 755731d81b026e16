"""What a checkpoint of FakeStrategy keeps beside tensors: the settings of the optimizer, and the loss scale of fp16."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from lightrft.errors import CheckpointError

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from lightrft.sim.flat_parameters import FlatParameters
    from lightrft.strategy.prepared import Prepared
    from lightrft.strategy.utils.agreement import Ranks
    from lightrft.strategy.utils.loss_scale import LossScale

__all__ = ["by_name", "by_order", "loss_scale", "named_groups", "set_loss_scale", "settings"]


def settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Learning rate, betas and the like of each parameter group."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def named_groups(optimizer: Optimizer, flat: list[FlatParameters], ranks: Ranks) -> list[dict[str, Any]]:
    """The same, with the names of the parameters of each group, of which a rank may hold no piece. *Collective*."""
    names = {piece.master: piece.name for one in flat for piece in one.pieces}
    mine = [[names[one] for one in group["params"] if one in names] for group in optimizer.param_groups]
    together = zip(*ranks.gather(mine), strict=True)
    everywhere = [list(dict.fromkeys(itertools.chain.from_iterable(found))) for found in together]
    return [{**group, "params": held} for group, held in zip(settings(optimizer), everywhere, strict=True)]


def by_order(optimizer: Optimizer, saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each group gets, as with DeepSpeed: the settings of the group in its place.

    Raises:
        CheckpointError: there are more groups, or fewer.
    """
    if len(saved) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint does not fit: its optimizer has {len(saved)} parameter groups, and this one "
            f"{len(optimizer.param_groups)}"
        )
    return saved


def by_name(here: list[dict[str, Any]], saved: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each group gets, as with FSDP: the settings of the group that held its first parameter; else its own."""
    of_name = {name: group for group in saved for name in group["params"]}
    found = [of_name.get(group["params"][0], group) if group["params"] else group for group in here]
    return [{key: value for key, value in group.items() if key != "params"} for group in found]


def loss_scale(prepared: Prepared) -> torch.Tensor | None:
    """Value and good steps, in float64; ``None`` without any."""
    scale: LossScale | None = prepared.backend.get("loss_scale")
    return None if scale is None else torch.tensor([scale.scale, scale.good_steps], dtype=torch.float64)


def set_loss_scale(prepared: Prepared, saved: torch.Tensor | None) -> None:
    """Go on from what was saved, if this run scales its loss."""
    scale: LossScale | None = prepared.backend.get("loss_scale")
    if scale is not None and saved is not None:
        scale.scale, scale.good_steps = float(saved[0]), int(saved[1])
