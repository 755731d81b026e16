"""Entropy: a bonus for it, and training on the tokens that have most of it."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrft.trainer.masking import inside

__all__ = ["entropy_loss", "high_entropy"]


def entropy_loss(entropy: Tensor, mask: Tensor) -> Tensor:
    """Minus the entropy of each token's distribution, shape (batch, length), 0 outside the mask.

    Added to the policy loss with a coefficient, it keeps the policy from becoming certain too early: Mnih et al.,
    *Asynchronous Methods for Deep Reinforcement Learning*, 2016, section 4.
    """
    return -inside(entropy, mask).float()


def high_entropy(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """The ``share`` of the tokens of each sequence whose distributions have the highest entropy.

    Wang et al., *Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive Effective Reinforcement Learning for LLM
    Reasoning*, 2025, train on these alone. There the share is of a batch; here it is of each sequence, so that it does
    not depend on how a batch is cut into micro-batches.

    Args:
        entropy: when the tokens were sampled, shape (batch, length).
        mask: true at generated tokens, shape (batch, length).
        share: above 0, at most 1; of ``n`` tokens ``ceil(share * n)`` are chosen, the earlier of two that are alike.

    Returns:
        A mask of shape (batch, length).
    """
    ranked = entropy.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(ranked).scatter_(
        1, ranked, torch.arange(ranked.shape[1], device=ranked.device).expand_as(ranked)
    )
    wanted = (mask.sum(1, keepdim=True) * share).ceil()
    return mask & (place < wanted)
