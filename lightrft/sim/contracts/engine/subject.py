"""What the contracts of engines and of sending weights need of an implementation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from unittest import SkipTest

import torch
from torch import Tensor, nn

from lightrft.sim.contracts.engine import reference
from lightrft.sim.contracts.findings import expect
from lightrft.strategy import weight_sync
from lightrft.strategy.engine import EngineStatus
from lightrft.strategy.utils.checkpoint_form import in_checkpoint_form

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from lightrft.sim.contracts.strategy.subject import World
    from lightrft.strategy.engine import RolloutEngine
    from lightrft.strategy.requests import Completion

__all__ = ["GREEDY", "Subject"]

TOKENS = 8
"""Of most completions of the checks."""

GREEDY: Mapping[str, Any] = {"temperature": 0, "max_tokens": TOKENS}


@dataclass(kw_only=True, eq=False)
class Subject:
    """An implementation of engines, under check. It keeps one engine for many checks.

    Attributes:
        start: starts an engine whose weights are those of ``models[index]``, on this process alone.
        models: two of one architecture, in evaluation mode: token ids of shape (batch, length) to an object with
            ``logits``. All of their weights differ.
        name: how messages call it.
        vocabulary: token ids that the models have, 64 at least; the checks use those from ``first_token`` on.
        max_model_len: most tokens of prompt and completion together; 64 at least.
        max_tokens: of a completion that does not say how many; below 32.
        end: token id at which a completion of the models ends.
        first_token: the first one that is neither special nor the end.
        encode, decode: of the tokenizer, if the engine has one; special tokens have no text.
        native: from our sampling parameters to an object of the engine's own library.
        library_calls: how often the engine of the library was called so far for an update, where it can be counted.
        world: makes a world of so many ranks, for engines that ranks share.
        start_shared: starts an engine on all ranks of a group, with the weights of ``models[0]``; pickled where ranks
            are processes.
        within: how far log-probs may be from those of the models.
        remembered: what was computed of the models, for several subjects of the same ones.
        lacks: capabilities that it does not have, each with the reason.
    """

    start: Callable[[int], RolloutEngine]
    models: tuple[nn.Module, nn.Module]
    name: str
    vocabulary: int
    max_model_len: int
    max_tokens: int
    end: int
    first_token: int
    encode: Callable[[str], list[int]] | None = None
    decode: Callable[[Sequence[int]], str] | None = None
    native: Callable[[Any], Any] | None = None
    library_calls: Callable[[RolloutEngine], int] | None = None
    world: Callable[[int], World] | None = None
    start_shared: Callable[[Any], RolloutEngine] | None = None
    within: float = 1e-4
    remembered: dict[Any, Any] = field(default_factory=dict)
    lacks: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._engine: RolloutEngine | None = None
        self._version: int | None = None
        self._told: dict[int, list[tuple[tuple[int, ...], Any]]] = {}

    # -- The engine ---------------------------------------------------------------------------------------------------

    def fresh(self) -> RolloutEngine:
        """The engine, awake, with the weights of the first model and empty caches."""
        engine = self._engine
        if engine is None or engine.status is EngineStatus.DEAD:
            return self.anew()
        engine.wake_up()
        if engine.status is not EngineStatus.AWAKE or engine.weight_version != self._version:
            self.send(0)
            self._version = engine.weight_version
        engine.reset_caches()
        return engine

    def anew(self) -> RolloutEngine:
        """An engine that has just been started, instead of the one that there was."""
        self.close()
        self._engine = engine = self.start(0)
        self._version = engine.weight_version
        return engine

    def close(self) -> None:
        """End the engine."""
        if self._engine is not None:
            self._engine.shutdown()
            self._engine = None

    @property
    def engine(self) -> RolloutEngine:
        """The engine as the last check has left it."""
        return self._engine if self._engine is not None else self.anew()

    def is_lacking(self, capability: str) -> bool:
        """Whether the implementation declares that it does not have a capability."""
        return capability in self.lacks

    def needs(self, there: object, what: str) -> None:
        """Skip the check where something is not there that is no capability of the engine."""
        if not there:
            raise SkipTest(f"{self.name}: {what}")

    # -- Requests -----------------------------------------------------------------------------------------------------

    @cached_property
    def prompts(self) -> list[tuple[int, ...]]:
        """Four prompts: of 3 tokens, of one, of 20, and the first one with another end."""
        first, count = self.first_token, self.vocabulary - self.first_token
        tokens = [first + 7 * place % count for place in range(1, 24)]
        return [tuple(tokens[:3]), (tokens[3],), tuple(tokens[3:23]), (*tokens[:2], tokens[5])]

    def generate(self, prompts: Sequence[Any] | None = None, **params: Any) -> list[Completion]:
        """Greedy completions of 8 tokens, unless ``params`` say otherwise."""
        wanted = self.prompts if prompts is None else prompts
        return self.engine.generate([{"prompt_token_ids": one} for one in wanted], {**GREEDY, **params})

    def samples(self, prompts: Sequence[Any] | None = None, **params: Any) -> list[tuple[int, ...]]:
        """Tokens of completions that are drawn, of 8 tokens each."""
        found = self.generate(prompts, **{"temperature": 1.0, "ignore_eos": True, **params})
        return [one.output_token_ids for one in found]

    # -- Weights ------------------------------------------------------------------------------------------------------

    def weights(self, index: int) -> dict[str, Tensor]:
        """Those of one of the models, by the names of its checkpoint."""
        model = self.models[index]
        return dict(in_checkpoint_form(model, ((name, one.detach()) for name, one in model.named_parameters())))

    def send(self, what: int | Mapping[str, Tensor | None], **options: Any) -> weight_sync.Sent:
        """Send weights, of one of the models or any, in buckets that are overwritten after use; leave out ``None``."""
        weights = self.weights(what) if isinstance(what, int) else what
        kept = ((name, tensor) for name, tensor in weights.items() if tensor is not None)
        return weight_sync.send(self.engine, kept, **{"bucket_bytes": 1 << 16, "poison": True, **options})

    def holds(self, what: int | nn.Module, when: str = "") -> None:
        """The engine generates as a model does, with the version that it has.

        Raises:
            AssertionError: it does not.
        """
        where = f" {when}" if when else ""
        found = self.generate(logprobs=0, ignore_eos=True)
        versions = {one.weight_version for one in found}
        if versions != {self.engine.weight_version}:
            raise AssertionError(f"completions of version {versions}, of an engine of {self.engine.weight_version}")
        if isinstance(what, int) and self.is_lacking("language_model"):
            told = [(one.output_token_ids, one.log_probs) for one in found]
            expect(
                told == self._told_by(what), f"{self.name} generates as another engine than one of model {what}{where}"
            )
            return
        model = self.models[what] if isinstance(what, int) else what
        for one, prompt in zip(found, self.prompts, strict=True):
            expected = reference.log_probs(model, prompt, one.output_token_ids)
            worst = float((torch.tensor(one.log_probs) - expected).abs().max())
            if not worst <= self.within:
                raise AssertionError(
                    f"{self.name}{where} does not hold the weights that it should: log-probs of {prompt} are off by "
                    f"{worst}"
                )
            best = self.best(what, prompt)
            expect(
                list(one.output_token_ids) == best or reference.is_tied(model, prompt, best, self.within),
                f"{self.name}{where} completes {prompt} by {one.output_token_ids}, expected {best}",
            )

    def best(self, what: int | nn.Module, prompt: tuple[int, ...], count: int = TOKENS) -> list[int]:
        """The likeliest tokens after a prompt, by a model, its end passed over."""
        if not isinstance(what, int):
            return reference.greedy(what, prompt, count)
        key = what, prompt, count
        if key not in self.remembered:
            self.remembered[key] = reference.greedy(self.models[what], prompt, count)
        found: list[int] = self.remembered[key]
        return found

    def alike(self, first: Sequence[Completion], second: Sequence[Completion]) -> bool:
        """Whether completions are the same but for the rounding of log-probs."""
        plain = [[replace(one, log_probs=None) for one in each] for each in (first, second)]
        both = [[value for one in each for value in one.log_probs or ()] for each in (first, second)]
        if plain[0] != plain[1] or len(both[0]) != len(both[1]):
            return False
        return all(abs(one - other) <= self.within for one, other in zip(*both, strict=True))

    def _told_by(self, index: int) -> list[tuple[tuple[int, ...], Any]]:
        """What an engine of the weights on disk says, for one whose completions are of no model."""
        if index not in self._told:
            other = self.start(index)
            params = {**GREEDY, "logprobs": 0, "ignore_eos": True}
            found = other.generate([{"prompt_token_ids": one} for one in self.prompts], params)
            self._told[index] = [(one.output_token_ids, one.log_probs) for one in found]
            other.shutdown()
        return self._told[index]

    # -- Ranks --------------------------------------------------------------------------------------------------------

    @cached_property
    def shared_lives(self) -> list[dict[str, Any]]:
        """What two ranks find that share an engine, by rank; see ``sharing.life``."""
        from lightrft.sim.contracts.engine.sharing import life

        if self.world is None or self.start_shared is None:
            raise AssertionError(
                f"{self.name} has no world, or no start_shared: give them, or declare that it lacks shared"
            )
        weights = [self.weights(index) for index in (0, 1)]
        return self.world(2).run(life, self.start_shared, self.prompts, weights, self.vocabulary)


def counted(weights: Mapping[str, Tensor], read: list[str]) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in buckets, whose names are in ``read`` once they were asked for."""
    for bucket in buckets_of(weights):
        read += [name for name, _ in bucket]
        yield bucket


def buckets_of(weights: Mapping[str, Tensor], size: int = 1 << 14) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in buckets, as a strategy sends them."""
    return weight_sync.in_buckets(weights.items(), size)
