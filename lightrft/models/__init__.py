"""Actor, critic and reward model, what they compute their numbers with, and tiny models to try them on.

Importing this package loads nothing else; each name loads what it needs when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.lazy import lazily

if TYPE_CHECKING:
    from lightrft.models.actor import Actor as Actor
    from lightrft.models.critic import Critic as Critic
    from lightrft.models.fused import fused_linear_log_probs as fused_linear_log_probs
    from lightrft.models.log_probs import TokenScores as TokenScores
    from lightrft.models.log_probs import token_log_probs as token_log_probs
    from lightrft.models.packing import balance as balance
    from lightrft.models.packing import pack as pack
    from lightrft.models.packing import pack_for_ranks as pack_for_ranks
    from lightrft.models.reward_model import RewardModel as RewardModel
    from lightrft.models.tiny import tiny_text_model as tiny_text_model
    from lightrft.models.tiny import tiny_vision_model as tiny_vision_model

__all__ = [
    "Actor",
    "Critic",
    "RewardModel",
    "TokenScores",
    "balance",
    "fused_linear_log_probs",
    "pack",
    "pack_for_ranks",
    "tiny_text_model",
    "tiny_vision_model",
    "token_log_probs",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Actor": ".actor",
        "Critic": ".critic",
        "RewardModel": ".reward_model",
        "TokenScores": ".log_probs",
        "balance": ".packing",
        "fused_linear_log_probs": ".fused",
        "pack": ".packing",
        "pack_for_ranks": ".packing",
        "tiny_text_model": ".tiny",
        "tiny_vision_model": ".tiny",
        "token_log_probs": ".log_probs",
    },
)
