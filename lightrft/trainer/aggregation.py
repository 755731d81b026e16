"""One number of the losses of all tokens, however they are spread over micro-batches and ranks.

A strategy averages the losses of micro-batches and ranks. That is right only if all of them have as many tokens. So
the denominators here are those of the whole optimizer step, and each micro-batch gives its share: the sum over its
tokens, divided by the denominator, times the number of micro-batches and ranks that the strategy divides by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightrft.errors import ConfigError
from lightrft.trainer.masking import masked_mean, masked_sum

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase

__all__ = ["AGGREGATIONS", "StepTotals", "aggregate", "data_parallel_sum", "step_totals"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTotals:
    """What one optimizer step has, over all micro-batches of all data-parallel ranks.

    Attributes:
        tokens: generated tokens.
        sequences: sequences with at least one generated token.
        shares: micro-batches, the empty ones included, over all data-parallel ranks.
    """

    tokens: int
    sequences: int
    shares: int


def _token_mean(losses: Tensor, mask: Tensor, totals: StepTotals, longest: int) -> Tensor:  # noqa: ARG001 - one form
    return masked_sum(losses, mask) / max(totals.tokens, 1)


def _sequence_mean(losses: Tensor, mask: Tensor, totals: StepTotals, longest: int) -> Tensor:  # noqa: ARG001
    return masked_mean(losses, mask, 1).sum() / max(totals.sequences, 1)


def _constant(losses: Tensor, mask: Tensor, totals: StepTotals, longest: int) -> Tensor:
    return masked_sum(losses, mask) / (max(totals.sequences, 1) * longest)


AGGREGATIONS: dict[str, Callable[[Tensor, Tensor, StepTotals, int], Tensor]] = {
    "token_mean": _token_mean,
    "sequence_mean": _sequence_mean,
    "constant": _constant,
}
"""Every way by the name that ``--loss_aggregation`` takes.

``token_mean``: every token weighs the same (Yu et al., *DAPO*, 2025, equation 12). ``sequence_mean``: every sequence
weighs the same, and its tokens share that (Shao et al., *DeepSeekMath*, 2024, equation 3). ``constant``: the sum over
the tokens of a sequence is divided by the largest length that there could be (Liu et al., *Understanding R1-Zero-Like
Training*, 2025, section 3.2, Dr. GRPO).
"""


def aggregate(losses: Tensor, mask: Tensor, *, how: str, totals: StepTotals, longest: int = 1) -> Tensor:
    """What a micro-batch gives ``strategy.backward``, so that an optimizer step has the gradient of the whole mean.

    Args:
        losses: of each token, shape (batch, length).
        mask: true at generated tokens, shape (batch, length). A batch of none gives 0, with a gradient of 0.
        how: of ``AGGREGATIONS``.
        totals: of the optimizer step.
        longest: most tokens that may be generated, for ``constant``.

    Raises:
        ConfigError: there is no such way.
    """
    if how not in AGGREGATIONS:
        raise ConfigError(f"loss_aggregation={how!r}: expected one of {', '.join(AGGREGATIONS)}")
    return AGGREGATIONS[how](losses, mask, totals, longest) * totals.shares


def data_parallel_sum(strategy: StrategyBase) -> Callable[[Tensor], Tensor]:
    """Gives the sum of a tensor over data-parallel ranks. What it gives is *collective*, over all ranks.

    The ranks of one sequence-parallel group hold the same tensor, which counts once.
    """

    def total(sums: Tensor) -> Tensor:
        found: Tensor = strategy.all_reduce(sums, op="sum")
        return found / strategy.groups.sp_size

    return total


def step_totals(strategy: StrategyBase, masks: Sequence[Sequence[Tensor]]) -> list[StepTotals]:
    """The totals of optimizer steps. *Collective*: one small one for all of them.

    Args:
        strategy: which trains.
        masks: for each optimizer step the masks (batch, length) of this rank's micro-batches; every rank has as many
            steps, and as many micro-batches in each.
    """
    counts = torch.tensor(
        [
            [sum(int(mask.sum()) for mask in step), sum(int(mask.any(1).sum()) for mask in step), len(step)]
            for step in masks
        ],
        dtype=torch.float64,
    ).reshape(len(masks), 3)
    summed = data_parallel_sum(strategy)(counts)
    return [
        StepTotals(tokens=round(tokens), sequences=round(sequences), shares=round(shares))
        for tokens, sequences, shares in summed.tolist()
    ]
