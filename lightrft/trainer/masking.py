"""Sums and means over the tokens of a mask. What lies outside it never counts, not even NaN or infinity."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inside", "last_of_each_row", "masked_mean", "masked_sum"]


def inside(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` where ``mask`` is true, 0 elsewhere; nothing flows back to what is elsewhere. Any equal shapes."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The sum inside ``mask``, over all or along ``dim``; 0 where nothing is inside."""
    chosen = inside(values, mask)
    return chosen.sum() if dim is None else chosen.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """The mean inside ``mask``, over all or along ``dim``; 0 where nothing is inside."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def last_of_each_row(mask: Tensor) -> Tensor:
    """True at the last true entry of each row of ``mask`` (batch, length), and nowhere else."""
    behind = mask.flip(1).cumsum(1).flip(1)
    return mask & (behind == 1)
