"""Entropy: a bonus for it, and training on the tokens that have most of it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightrft.trainer.masking import inside

__all__ = ["entropy_loss", "high_entropy"]

_COARSE_BITS, _FINE_BITS, _IGNORED_BITS = 15, 4, 12
"""Of a number in fp32 that is not negative."""

_ROUNDING = 1e-6
"""Of a number of tokens, by which a share of them may be above the whole number that is meant."""


def entropy_loss(entropy: Tensor, mask: Tensor) -> Tensor:
    """Minus the entropy of each token's distribution, shape (batch, length), 0 outside the mask.

    Added to the policy loss with a coefficient, it keeps the policy from becoming certain too early: Mnih et al.,
    *Asynchronous Methods for Deep Reinforcement Learning*, 2016, section 4.
    """
    return -inside(entropy, mask).float()


def high_entropy(
    entropy: Tensor, mask: Tensor, share: float, total: Callable[[Tensor], Tensor] = lambda sums: sums
) -> Tensor:
    """The ``share`` of the tokens of an iteration whose distributions have the highest entropy.

    Wang et al., *Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM
    Reasoning*, 2025, train on these alone: on the tokens whose entropy is not below that of the last one of the share,
    in the whole batch. A sequence may have none of them. What is alike within 0.05 % counts as equal, so that rounding
    seldom decides.

    Args:
        entropy: when the tokens were sampled, shape (batch, length); NaN counts as the highest.
        mask: true at generated tokens, shape (batch, length).
        share: above 0, at most 1; of ``n`` tokens ``ceil(share * n)`` are chosen, and those equal to the last of them.
        total: gives the sum of a tensor over data-parallel ranks. *Collective*, called three times.

    Returns:
        A mask of shape (batch, length).
    """
    (count,) = total(mask.sum().double().unsqueeze(0)).tolist()
    wanted = math.ceil(share * count - _ROUNDING)
    # Numbers that are not negative have the order of their bits; the last ones are left out.
    keys = (inside(entropy, mask).float().clamp(min=0) + 0.0).view(torch.int32).long() >> _IGNORED_BITS
    coarse, fine = keys >> _FINE_BITS, keys & (1 << _FINE_BITS) - 1
    upper, left = _nth_largest(total(_counts(coarse[mask], _COARSE_BITS)), wanted)
    lower, _ = _nth_largest(total(_counts(fine[mask & (coarse == upper)], _FINE_BITS)), left)
    return mask & (keys >= (upper << _FINE_BITS) + lower)


def _counts(keys: Tensor, bits: int) -> Tensor:
    """How often there is each number of ``bits`` bits, in fp64."""
    return torch.bincount(keys, minlength=1 << bits).double()


def _nth_largest(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The ``wanted``-th largest number, of which there are ``counts`` each, and what place it has among its equals."""
    down = counts.flip(0).cumsum(0)
    place = min(int((down < wanted).sum()), len(counts) - 1)
    number = len(counts) - 1 - place
    return number, wanted - int(down[place] - counts[number])
