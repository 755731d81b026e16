"""A language model that computes no language: tokens and log-probs follow from a fingerprint of the weights."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import nn

from lightrft.errors import StaleWeightsError
from lightrft.sim.engine.language_model import LanguageModel
from lightrft.sim.engine.numbers import U64, digest, mixed, uniform
from lightrft.sim.engine.samples import Drawn, Sample
from lightrft.strategy.utils.fingerprints import fingerprint

if TYPE_CHECKING:
    from torch import Size, Tensor

__all__ = ["HashModel"]

_END_ODDS = 64
"""One token in so many ends a completion."""

_BASE = np.uint64(0x2545F4914F6CDD1D)
_TOKEN, _LOG_PROB, _END = 1, 2, 3


class HashModel(LanguageModel):
    """Fast, and right in what counts for a trainer's plumbing.

    A completion depends on the weights, the prompt and its media, the parameters and the seed, and on nothing else;
    where the temperature is 0 or ``top_k`` 1, not on the seed. Log-probs are negative and no probabilities of anything.

    Args:
        vocabulary: how many tokens there are.
        ends: tokens that end a completion.
        shapes: names and shapes of the weights; empty if they are not known, then those of the first update count.
        optional: names among them that an update may leave out.
        prefix_caching: whether prompts that were seen are taken from the prefix cache.
    """

    def __init__(
        self,
        vocabulary: int,
        ends: frozenset[int] = frozenset(),
        *,
        shapes: Mapping[str, Size] | None = None,
        optional: frozenset[str] = frozenset(),
        prefix_caching: bool = True,
    ) -> None:
        self.vocabulary = vocabulary
        self.ends = ends
        self._shapes = dict(shapes or {})
        self._optional = optional
        self._prefix_caching = prefix_caching
        self._weights: dict[str, Tensor] = {}
        self._fingerprint = ""
        self._prefixes: dict[int, int] = {}
        self._media: dict[int, int] = {}

    def shapes(self) -> Mapping[str, Size]:
        """See ``LanguageModel``."""
        return self._shapes

    def optional(self) -> frozenset[str]:
        """See ``LanguageModel``."""
        return self._optional

    def put(self, name: str, tensor: Tensor) -> None:
        """See ``LanguageModel``."""
        held = self._weights.get(name)
        if held is not None and held.shape == tensor.shape and held.dtype == tensor.dtype:
            held.copy_(tensor.detach())
        else:
            self._weights[name] = tensor.detach().cpu().clone()
        self._fingerprint = ""

    def drop(self) -> None:
        """See ``LanguageModel``."""
        self._shapes = self._shapes or {name: tensor.shape for name, tensor in self._weights.items()}
        self._weights.clear()
        self._fingerprint = ""

    def fingerprint(self) -> str:
        """See ``LanguageModel``."""
        if not self._weights:
            raise StaleWeightsError("the fake engine holds no weights: send them with update_engine_weights first")
        if not self._fingerprint:
            held = sorted((name, fingerprint(tensor)) for name, tensor in self._weights.items())
            self._fingerprint = f"{digest(held):016x}"
        return self._fingerprint

    def module(self) -> nn.Module:
        """Its weights, in modules of their names."""
        root = nn.Module()
        for name, tensor in self._weights.items():
            *path, last = name.split(".")
            owner = root
            for part in path:
                if part not in dict(owner.named_children()):
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            owner.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
        return root

    def forget(self) -> None:
        """See ``LanguageModel``."""
        self._prefixes.clear()

    def forget_media(self) -> None:
        """See ``LanguageModel``."""
        self._media.clear()

    def draw(self, samples: Sequence[Sample]) -> list[Drawn]:
        """See ``LanguageModel``."""
        weights = int(self.fingerprint(), 16)
        keys = self._keys(samples, weights)
        longest = max(sample.params.max_tokens or 1 for sample in samples)
        steps = np.arange(longest, dtype=np.uint64)
        grid = mixed(keys[:, None], steps[None, :])
        tokens = mixed(grid, _TOKEN) % np.uint64(self.vocabulary)
        log_probs = np.log1p(-uniform(mixed(grid, _LOG_PROB)))
        ending = mixed(grid, _END) % np.uint64(_END_ODDS) == 0
        return [self._drawn(sample, tokens[row], log_probs[row], ending[row]) for row, sample in enumerate(samples)]

    def _keys(self, samples: Sequence[Sample], weights: int) -> U64:
        """One number for each sample."""
        found = _prompt_numbers({sample.tokens for sample in samples})
        parameters: dict[int, int] = {}
        keys = np.empty((len(samples), 4), dtype=np.uint64)
        for row, sample in enumerate(samples):
            prompt = found[sample.tokens]
            params = parameters.get(id(sample.params))
            if params is None:
                params = parameters[id(sample.params)] = digest(_shape_of(sample))
            if sample.media:
                prompt ^= digest(self._media.setdefault(one.digest, weights) ^ one.digest for one in sample.media)
            source = self._prefixes.setdefault(prompt, weights) if self._prefix_caching else weights
            greedy = sample.params.temperature == 0 or sample.params.top_k == 1
            keys[row] = (prompt, source, params, 0 if greedy else sample.seed % 2**64)
        mixture = keys[:, 0]
        for column in range(1, 4):
            mixture = mixed(mixture ^ mixed(keys[:, column]), column)
        return mixture

    def _drawn(self, sample: Sample, tokens: U64, log_probs: np.ndarray, ending: np.ndarray) -> Drawn:
        params = sample.params
        limit = params.max_tokens or 1
        drawn = tokens[:limit].tolist()
        ends = self.ends.union(params.stop_token_ids) if params.min_tokens else self.ends
        for place in range(min(params.min_tokens, limit)):
            while drawn[place] in ends and len(ends) < self.vocabulary:
                drawn[place] = (drawn[place] + 1) % self.vocabulary
        own = sorted(self.ends) if not params.ignore_eos else []
        stops = [*params.stop_token_ids, *own]
        length, stop = limit, None  # type: int, int | str | None
        if stops:
            places = np.flatnonzero(ending[params.min_tokens : limit])
            end = int(places[0]) + params.min_tokens if len(places) else limit
            natural = next((i for i, token in enumerate(drawn) if token in stops and i >= params.min_tokens), limit)
            if min(end, natural) < limit:
                length = min(end, natural) + 1
                if natural >= end:
                    drawn[length - 1] = stops[0]
                stop = drawn[length - 1]
        for end in range(params.min_tokens + 1, length + 1) if params.stop else ():
            if (text := self.stop_in(drawn[:end], params)) is not None:
                length, stop = end, text
                break
        found = tuple(log_probs[:length].tolist())
        return Drawn(
            tokens=tuple(drawn[:length]),
            raw=found,
            processed=found,
            tempered=found,
            finish_reason="length" if stop is None else "stop",
            stop=stop if isinstance(stop, str) or stop in params.stop_token_ids else None,
        )


def _prompt_numbers(prompts: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    """Of each prompt a polynomial of its tokens modulo 2**64, mixed."""
    found = {}
    for tokens in prompts:
        array = np.array(tokens, dtype=np.uint64)
        found[tokens] = ((array + np.uint64(1)) * _powers(len(tokens))).sum() ^ np.uint64(len(tokens))
    return dict(zip(found, mixed(np.array(list(found.values()), dtype=np.uint64)).tolist(), strict=True))


def _powers(count: int) -> U64:
    return _powers_of_two(max(count, 1024).bit_length())[:count]


@functools.cache
def _powers_of_two(bits: int) -> U64:
    with np.errstate(over="ignore"):
        return np.cumprod(np.full(1 << bits, _BASE), dtype=np.uint64)


def _shape_of(sample: Sample) -> list[object]:
    """What of the parameters changes the distribution."""
    params = sample.params
    return [
        params.temperature, params.top_p, params.top_k, params.min_p, params.presence_penalty,
        params.frequency_penalty, params.repetition_penalty, sorted((params.logit_bias or {}).items()),
    ]  # fmt: skip
