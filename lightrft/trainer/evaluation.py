"""How good the actor is on prompts that it is not trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightrft.strategy.utils.agreement import Ranks
from lightrft.trainer.generation import Generation, seed_of
from lightrft.trainer.metrics import Means

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase
    from lightrft.trainer.rewards.source import RewardSource

__all__ = ["evaluate"]


def evaluate(strategy: StrategyBase, generation: Generation, rewards: RewardSource, prompts: Any) -> dict[str, float]:
    """The mean rewards of completions of ``prompts``, each prompt once. *Collective*.

    The ranks share the prompts, in rounds of ``rollout_batch_size``; in the last one some may have none.

    Args:
        strategy: whose engine generates.
        generation: how.
        rewards: where they come from.
        prompts: a data set, the same on every rank.

    Returns:
        ``eval/reward``, ``eval/response_length``, ``eval/truncated``, and what ``rewards`` reports beside.
    """
    means = Means()
    size, groups = strategy.config.rollout_batch_size, strategy.groups
    for turn, first in enumerate(range(0, len(prompts), size)):
        mine = range(first + groups.dp_rank, min(first + size, len(prompts)), groups.dp_size)
        samples = generation([prompts[place] for place in mine], seed_of(strategy.config.seed, turn))
        found = rewards(samples)
        means.add("eval/reward", found.rewards.sum(), len(samples))
        means.add("eval/response_length", float(sum(len(one.output_token_ids) for one in samples)), len(samples))
        means.add("eval/truncated", sum(one.truncated for one in samples), len(samples))
        means.expect(f"eval/{name}" for names in Ranks().gather(tuple(found.metrics)) for name in names)
        for name, each in found.metrics.items():
            means.add(f"eval/{name}", each.sum(), len(samples))
    return means.over_ranks(strategy)
