"""What models say of tokens that were drawn: log-probs of the distributions they were drawn from, and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError
from lightrft.trainer.experience import join_images

if TYPE_CHECKING:
    from torch import Tensor

    from lightrft.models.log_probs import TokenScores
    from lightrft.trainer.experience import Experience

__all__ = ["Scoring", "never_drawn", "values_of"]

_NEVER = -100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """Asks an actor as the engine was asked.

    Attributes:
        temperature: with which tokens are drawn.
        forbidden: tokens that are never drawn.
    """

    temperature: float = 1.0
    forbidden: tuple[int, ...] = ()

    def __call__(self, actor: Any, batch: Experience, *, entropy: bool = False) -> TokenScores:
        """Log-probs of the tokens of ``batch``, and the entropy if it is asked for. *Collective*.

        Raises:
            ConfigError: the actor gives no entropy.
        """
        bias = never_drawn(self.forbidden)
        found: TokenScores = actor(
            batch.sequences,
            batch.attention_mask,
            temperature=self.temperature,
            entropy=entropy,
            **({"logit_bias": bias} if bias else {}),
            **join_images(batch.images),
        )
        if entropy and found.entropy is None:
            raise ConfigError(f"{type(actor).__name__} gave no entropy: expected one for each token with entropy=True")
        return found


def values_of(critic: Any, batch: Experience) -> Tensor:
    """What ``critic`` expects before each token but the first, shape (batch, length - 1). *Collective*."""
    found: Tensor = critic(batch.sequences, batch.attention_mask, **join_images(batch.images))
    return found[:, :-1]


def never_drawn(tokens: Sequence[int]) -> dict[int, float] | None:
    """What is added to the logits of ``tokens`` so that none of them is drawn; ``None`` without any."""
    return dict.fromkeys(tokens, _NEVER) or None
