"""Several sources of rewards, weighted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightrft.errors import ConfigError
from lightrft.trainer.rewards.source import Rewards, RewardSource, Scored

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["RewardMixture"]


class RewardMixture(RewardSource):
    """The weighted mean of several rewards: ``sum(weight * reward) / sum(weight)``.

    Args:
        sources: one at least; asked in this order.
        weights: one for each, not all 0; equal ones if ``None``. The part of each source is reported under its name.

    Raises:
        ConfigError: weights and sources do not fit.
    """

    name = "mixture"

    def __init__(self, sources: Sequence[RewardSource], weights: Sequence[float] | None = None) -> None:
        self.sources = list(sources)
        self.weights = [1.0] * len(self.sources) if weights is None else [float(weight) for weight in weights]
        if not self.sources or len(self.weights) != len(self.sources):
            raise ConfigError(
                f"{len(self.weights)} weights for {len(self.sources)} sources of rewards: expected one for each"
            )
        if not sum(self.weights) > 0:
            raise ConfigError(f"the weights of rewards are {self.weights}: expected a sum above 0")
        self._names = _unique([source.name for source in self.sources])

    @property
    def is_collective(self) -> bool:  # type: ignore[override]
        """Whether one of them is."""
        return any(source.is_collective for source in self.sources)

    def __call__(self, samples: Scored) -> Rewards:
        """See ``RewardSource``."""
        found = [source(samples) for source in self.sources]
        metrics: dict[str, Tensor] = {}
        for name, each in zip(self._names, found, strict=True):
            metrics[name] = each.rewards
            metrics |= {(key if key not in metrics else f"{name}/{key}"): value for key, value in each.metrics.items()}
        total = sum(weight * each.rewards for weight, each in zip(self.weights, found, strict=True))
        return Rewards(rewards=total / sum(self.weights), metrics=metrics)  # type: ignore[arg-type]


def _unique(names: list[str]) -> list[str]:
    """Names with numbers behind those that are there twice."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if names.count(name) == 1 else f"{name}_{seen[name]}")
    return found
