"""Where rewards come from: Python functions, reward models, services over HTTP, and mixtures of them."""

from __future__ import annotations

from lightrft.trainer.rewards.functions import FunctionReward
from lightrft.trainer.rewards.mixture import RewardMixture
from lightrft.trainer.rewards.models import ModelReward
from lightrft.trainer.rewards.remote import RemoteReward
from lightrft.trainer.rewards.source import Rewards, RewardSource, Scored
from lightrft.trainer.rewards.sources import reward_source

__all__ = [
    "FunctionReward",
    "ModelReward",
    "RemoteReward",
    "RewardMixture",
    "RewardSource",
    "Rewards",
    "Scored",
    "reward_source",
]
