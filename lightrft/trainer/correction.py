"""The difference between the log-probs of the engine, which has drawn the tokens, and those of the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightrft.trainer.masking import inside, masked_sum

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["importance_weights", "mismatch"]


def importance_weights(log_probs: Tensor, engine_log_probs: Tensor, mask: Tensor, cap: float) -> Tensor:
    """What the loss of each token is multiplied by, since another policy has drawn it: truncated importance sampling.

    Yao et al., *Your Efficient RL Framework Secretly Brings You Off-Policy RL Training*, 2025:
    ``min(p_trainer / p_engine, cap)``, without gradient.

    Args:
        log_probs: of the trainer, with the weights that the engine had, shape (batch, length).
        engine_log_probs: of the engine, shape (batch, length).
        mask: true at generated tokens, shape (batch, length).
        cap: largest weight, above 0.

    Returns:
        Shape (batch, length), 0 outside the mask.
    """
    return inside(_log_ratio(log_probs, engine_log_probs, mask).exp().clamp(max=cap), mask).detach()


def mismatch(log_probs: Tensor, engine_log_probs: Tensor, mask: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
    """How far the two are apart, as sums and counts of tokens that can be added up over ranks.

    Args:
        log_probs: of the trainer, shape (batch, length).
        engine_log_probs: of the engine, shape (batch, length).
        mask: true at generated tokens, shape (batch, length).

    Returns:
        ``mismatch/log_prob``: the absolute difference; ``mismatch/ratio``: the importance ratio, 1 if all is well;
        ``mismatch/kl``: the divergence of the engine from the trainer, estimated as ``ratio - 1 - log(ratio)``.
    """
    difference = _log_ratio(log_probs, engine_log_probs, mask)
    ratio = difference.exp()
    count = mask.sum()
    return {
        "mismatch/log_prob": (masked_sum(difference.abs(), mask), count),
        "mismatch/ratio": (masked_sum(ratio, mask), count),
        "mismatch/kl": (masked_sum(ratio - 1 - difference, mask), count),
    }


def _log_ratio(log_probs: Tensor, engine_log_probs: Tensor, mask: Tensor) -> Tensor:
    return inside(log_probs, mask).float() - inside(engine_log_probs, mask).float()
