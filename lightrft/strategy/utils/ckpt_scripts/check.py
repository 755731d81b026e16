"""Reading back what was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from lightrft.errors import CheckpointError

if TYPE_CHECKING:
    from lightrft.strategy.utils.ckpt_scripts.contents import Contents
    from lightrft.strategy.utils.ckpt_scripts.progress import Progress

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it.

    Attributes:
        tensors: how many were compared.
        worst: the largest difference.
    """

    tensors: int
    worst: float


def compare(expected: Contents, found: Contents, progress: Progress) -> Comparison:
    """Compare everything, tensor by tensor.

    Raises:
        CheckpointError: something differs; the message names it.
    """
    problems = _different_names(expected, found)
    worst = 0.0
    for place in (place for place in expected.specs if place in found.specs):
        difference = _difference(expected.read(place), found.read(place))
        progress.add(expected.specs[place].bytes)
        worst = max(worst, difference)
        if difference:
            problems.append(f"{place} differs by {difference:g}")
    if expected.groups != found.groups:
        problems.append("the settings of the optimizer differ")
    if expected.loss_scale != found.loss_scale:
        problems.append(f"the loss scale is {found.loss_scale}, not {expected.loss_scale}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(f"what was written is not what the source holds: {'; '.join(problems[:5])}{more}")
    return Comparison(len(expected.specs), worst)


def _different_names(expected: Contents, found: Contents) -> list[str]:
    missing = [f"{place} is missing" for place in expected.specs if place not in found.specs]
    return missing + [f"{place} is too much" for place in found.specs if place not in expected.specs]


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of two elements; infinite for tensors of different shapes, or NaN in one of them."""
    if one.shape != other.shape:
        return float("inf")
    if torch.equal(one, other):
        return 0.0
    first, second = one.double(), other.double()
    apart = (first - second).abs()
    apart = torch.where((first == second) | (first.isnan() & second.isnan()), torch.zeros_like(apart), apart)
    return float(apart.nan_to_num(nan=float("inf"), posinf=float("inf")).max())
