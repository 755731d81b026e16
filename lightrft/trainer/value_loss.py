"""The loss of the critic."""

from __future__ import annotations

import torch
from torch import Tensor

from lightrft.trainer.masking import inside

__all__ = ["value_loss"]


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Half the squared error of each value, the larger of that of the value and of the value near its old one.

    ``0.5 * max((V - R)**2, (clip(V, V_old - clip, V_old + clip) - R)**2)``: Schulman et al., *High-Dimensional
    Continuous Control Using Generalized Advantage Estimation*, 2016, section 5, keep the critic near its old self; the
    clipped form is that of their implementation of PPO (Huang et al., *The 37 Implementation Details of Proximal Policy
    Optimization*, 2022, detail 9).

    Args:
        values: now, with gradient, shape (batch, length).
        old_values: when the tokens were sampled, shape (batch, length).
        returns: what should have been predicted, shape (batch, length).
        mask: true at generated tokens, shape (batch, length).
        clip: how far a value may move for nothing; 0 does not clip.

    Returns:
        The loss of each token, 0 outside the mask, and which tokens are clipped; both of shape (batch, length).
    """
    now, target = inside(values, mask).float(), inside(returns, mask).float()
    error = (now - target).square()
    if not clip:
        return 0.5 * error, torch.zeros_like(mask)
    old = inside(old_values, mask).float()
    clipped = (old + (now - old).clamp(-clip, clip) - target).square()
    return 0.5 * torch.maximum(error, clipped), mask & (clipped > error)
