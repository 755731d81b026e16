"""One source of rewards of whatever a trainer was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError
from lightrft.trainer.rewards.functions import FunctionReward
from lightrft.trainer.rewards.mixture import RewardMixture
from lightrft.trainer.rewards.models import ModelReward
from lightrft.trainer.rewards.remote import RemoteReward
from lightrft.trainer.rewards.source import RewardSource

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase
    from lightrft.trainer.settings import TrainerConfig

__all__ = ["reward_source"]


def reward_source(given: Any, strategy: StrategyBase, config: TrainerConfig) -> RewardSource:
    """The rewards that ``given`` and the settings name; several are mixed by ``reward_weights``. *Collective*.

    Args:
        given: ``None``, or one or a list of: a ``RewardSource``, a prepared model, a function, a text as ``http://...``
            or ``path.py:function``. Those of ``config.reward_function`` and ``config.remote_reward_url`` come after.
        strategy: which has prepared the models.
        config: the settings.

    Raises:
        ConfigError: there is none, or weights do not fit.
    """
    several = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    several += [config.reward_function, config.remote_reward_url]
    sources = [_source(one, strategy, config) for one in several if one is not None]
    if not sources:
        raise ConfigError(
            "there is nothing that gives rewards: pass reward_model (a model, a function, an address, or a list of "
            "them), or set reward_function or remote_reward_url"
        )
    weights = config.weights_of_rewards()
    if len(sources) == 1 and weights is None:
        return sources[0]
    return RewardMixture(sources, weights)


def _source(one: Any, strategy: StrategyBase, config: TrainerConfig) -> RewardSource:
    import torch

    if isinstance(one, RewardSource):
        return one
    if isinstance(one, torch.nn.Module):
        size = strategy.config.micro_rollout_batch_size
        return ModelReward(one, strategy, micro_batch_size=size, offload=config.offload_reward_models)
    if isinstance(one, str) and one.startswith(("http://", "https://")):
        return RemoteReward(one, timeout=config.remote_reward_timeout, attempts=config.remote_reward_attempts)
    if isinstance(one, str) or callable(one):
        return FunctionReward(one)
    raise ConfigError(
        f"got {type(one).__name__} as a source of rewards: expected a model, a function, 'path.py:function', "
        "'http://...', or a RewardSource"
    )
