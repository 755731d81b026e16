"""One source of rewards of whatever a trainer was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError, RewardError
from lightrft.strategy.utils.agreement import Ranks
from lightrft.trainer.rewards.functions import FunctionReward
from lightrft.trainer.rewards.mixture import RewardMixture
from lightrft.trainer.rewards.models import ModelReward
from lightrft.trainer.rewards.remote import RemoteReward
from lightrft.trainer.rewards.source import Rewards, RewardSource, Scored

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase
    from lightrft.trainer.settings import TrainerConfig

__all__ = ["Together", "reward_source"]


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
    sources = [_together(_source(one, strategy, config), strategy) for one in several if one is not None]
    if not sources:
        raise ConfigError(
            "there is nothing that gives rewards: pass reward_model (a model, a function, an address, or a list of "
            "them), or set reward_function or remote_reward_url"
        )
    weights = config.weights_of_rewards()
    if len(sources) == 1 and weights is None:
        return sources[0]
    return RewardMixture(sources, weights)


class Together(RewardSource):
    """Asks a source that ranks ask by themselves, and makes them succeed or fail together.

    Of the ranks of a sequence-parallel group, which have the same samples, the first one asks.

    Args:
        source: not collective.
        strategy: whose ranks these are.
    """

    is_collective = True

    def __init__(self, source: RewardSource, strategy: StrategyBase) -> None:
        self.name = source.name
        self.source = source
        self._strategy = strategy

    def __call__(self, samples: Scored) -> Rewards:
        """See ``RewardSource``. *Collective*."""
        groups = self._strategy.groups
        found = None
        with Ranks().together("there are no rewards", RewardError):
            if self._strategy.get_rank() % groups.sp_size == 0:
                found = self.source(samples)
        shared: Rewards | None = found if groups.sp is None else Ranks(groups.sp).gather(found)[0]
        assert shared is not None
        return shared


def _together(source: RewardSource, strategy: StrategyBase) -> RewardSource:
    if isinstance(source, RewardMixture):
        return RewardMixture([_together(one, strategy) for one in source.sources], source.weights)
    return source if source.is_collective else Together(source, strategy)


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
