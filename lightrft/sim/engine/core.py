"""The core of the fake engine: a model, its state, and the ranks that share it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightrft.errors import EngineStateError
from lightrft.sim.current import current_task
from lightrft.sim.engine.numbers import digest
from lightrft.strategy.engine_state import EngineState

if TYPE_CHECKING:
    from torch import Tensor

    from lightrft.sim.engine.language_model import LanguageModel
    from lightrft.sim.engine.samples import Drawn, Sample
    from lightrft.strategy.utils.agreement import Ranks

__all__ = ["Core"]

_numbers = itertools.count()
_unread: dict[int, _Answer] = {}


class Core:
    """One engine, behind whatever face.

    The ranks of a tensor-parallel group hold the same weights and are asked the same. Here each holds all of them, and
    rank 0 of the group computes for all, once they have found that they agree.

    Args:
        model: what generates.
        name: of the engine, for messages.
        ranks: that share it.
    """

    def __init__(self, model: LanguageModel, name: str, ranks: Ranks) -> None:
        self.model = model
        self.state = EngineState(name)
        self.ranks = ranks

    def generate(self, samples: Sequence[Sample]) -> list[Drawn]:
        """A completion of each sample, the same on all ranks of the group. *Collective* in the group.

        Raises:
            EngineStateError: the engine is asleep or dead; or the ranks of the group ask for different things, hold
                different weights, or draw without a seed, which gives each another completion.
            StaleWeightsError: its weights are dropped or half updated.
        """
        return self.state.generate(lambda: self._generate(samples))

    def _generate(self, samples: Sequence[Sample]) -> list[Drawn]:
        if self.ranks.world_size == 1:
            return self.model.draw(samples)
        with self.ranks.together("ranks of one engine cannot generate", EngineStateError) as asked:
            asked.mine = self._question(samples)
        self._check_same(asked.all)
        with self.ranks.together("generation failed", EngineStateError) as answer:
            if self.ranks.rank == 0:
                answer.mine = _Answer(self.model.draw(samples), readers=self.ranks.world_size)
        found: _Answer = answer.all[0]
        return list(found.drawn)

    def _question(self, samples: Sequence[Sample]) -> dict[str, Any]:
        return {
            "the number of prompts": len(samples),
            "the prompts": hash(
                tuple((one.tokens, *(medium.digest for medium in one.media)) for one in samples)
            ),  # of numbers: the same everywhere
            "the sampling parameters": digest(_texts(samples)),
            "the seeds": hash(tuple(one.seed for one in samples)),
            "the weights": self.model.fingerprint(),
        }

    def _check_same(self, asked: Sequence[dict[str, Any]]) -> None:
        for name, first in asked[0].items():
            other = [rank for rank, each in enumerate(asked) if each[name] != first]
            if other:
                raise EngineStateError(
                    f"{name} of {self.state.name} differ{'s' * (name == 'the number of prompts')} between the ranks of "
                    f"its group: rank 0 has {first!r}, rank {other[0]} has {asked[other[0]][name]!r}. Tensor-parallel "
                    "ranks compute together, and real ones would hang or return nonsense"
                )

    def sleep(self, level: int = 1) -> None:
        """See ``EngineState.sleep``; the caches are lost, at level 2 the weights too."""
        self.state.sleep(level, lambda: self._drop(level))

    def _drop(self, level: int) -> None:
        self.reset_caches()
        if level > 1:
            self.model.drop()

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """See ``EngineState.wake_up``."""
        self.state.wake_up(tags, lambda _: None)

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int | None = None) -> None:
        """Replace all weights; the caches stay as they are.

        Raises:
            WeightSyncError: they do not fit the model; the engine is stale then.
        """
        wanted = self.state.weight_version + 1 if version is None else version
        self.state.update(wanted, lambda: self.model.load(weights))

    def reset_caches(self) -> None:
        """Forget prefixes, images and videos."""
        self.model.forget()
        self.model.forget_media()


@dataclass
class _Answer:
    """Completions on their way to all ranks of an engine. Simulated ranks, which share a process, need no copies."""

    drawn: Sequence[Drawn]
    readers: int

    def __reduce__(self) -> Any:
        if current_task() is None:
            return _Answer, (self.drawn, self.readers)
        number = next(_numbers)
        _unread[number] = self
        return _read, (number,)


def _read(number: int) -> _Answer:
    answer = _unread[number]
    answer.readers -= 1
    if not answer.readers:
        del _unread[number]
    return answer


def _texts(samples: Sequence[Sample]) -> list[str]:
    """The parameters of each sample; many share them."""
    known: dict[int, str] = {}
    return [known.get(id(one.params)) or known.setdefault(id(one.params), str(one.params)) for one in samples]


def flat(buckets: Iterable[Iterable[tuple[str, Tensor]]]) -> Iterator[tuple[str, Tensor]]:
    """The weights in buckets, one after the other."""
    for bucket in buckets:
        yield from bucket
