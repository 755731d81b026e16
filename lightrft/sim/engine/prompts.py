"""From prompts to keys and values: each prompt is computed once, next to others that are about as long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightrft.sim.engine.key_values import KeyValues, Prefix, PrefixCache, Prompt

if TYPE_CHECKING:
    from lightrft.sim.engine.network import Network
    from lightrft.sim.engine.samples import Sample

__all__ = ["Prompts"]

_ALIKE = 0.7
"""Prompts are computed together if the shortest is this share of the longest, or more."""

_ANYWAY = 8
"""Prompts are computed together whose lengths differ by no more."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Consecutive rows of a batch that are computed together; with media it is one."""

    first: int
    prompts: list[Prompt]

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.prompts))

    @property
    def longest(self) -> int:
        return max(len(tokens) for tokens, _ in self.prompts)


class Prompts:
    """Computes prompts.

    Args:
        network: what computes.
        cache: of prompts that were seen, if there is one.
    """

    def __init__(self, network: Network, cache: PrefixCache | None) -> None:
        self._network = network
        self._cache = cache

    def computed(self, samples: Sequence[Sample], more: int) -> tuple[KeyValues, Tensor]:
        """Keys and values, and the logits (B, V) of the last token, of the prompts of samples.

        Args:
            samples: B of them.
            more: tokens that will come after each prompt at most.
        """
        wanted = [(sample.tokens, sample.media) for sample in samples]
        several = sorted(dict.fromkeys(wanted), key=lambda prompt: len(prompt[0]))
        known = [] if self._cache is None else [prompt for prompt in several if prompt in self._cache]
        order = [*known, *(prompt for prompt in several if prompt not in set(known))] if known else several
        held = self._network.room_for([len(tokens) for tokens, _ in order], more)
        logits = [self._remembered(held, known)] if known else []
        logits += [self._new(held, group) for group in _groups(order, len(known))]
        found = torch.cat(logits)
        if order == wanted:
            return held, found
        place = {prompt: row for row, prompt in enumerate(order)}
        rows = torch.tensor([place[prompt] for prompt in wanted])
        return held.select(rows, more), found[rows]

    def _new(self, held: KeyValues, group: _Group) -> Tensor:
        first = held.length - group.longest
        rows = group.rows
        (tokens, media), *_ = group.prompts
        if media:
            embedded, positions, shift = self._network.seeing(tokens, media)
            held.shift[rows] += shift
        else:
            shift = 0
            ids = torch.tensor([[0] * (group.longest - len(one)) + list(one) for one, _ in group.prompts])
            embedded = self._network.embedded(ids)
            positions = (torch.arange(first, held.length) + held.shift[rows]).clamp_(min=0)
        seen = held.mask[rows, ..., first : held.length] + _causal(group.longest, held.mask.dtype)
        seen.diagonal(dim1=-2, dim2=-1).zero_()  # padding sees itself, so that nothing is NaN
        logits = self._network(embedded, positions, seen, held.part(rows, first))
        self._remember(held, group, shift)
        return logits

    def _remember(self, held: KeyValues, group: _Group, shift: int) -> None:
        """All but the last token, which is computed with the weights of the time when the prompt comes again."""
        if self._cache is None:
            return
        for row, prompt in enumerate(group.prompts, group.first):
            count = len(prompt[0]) - 1
            if count:
                first = held.length - 1 - count
                layers = [
                    (k[row].narrow(1, first, count).clone(), v[row].narrow(1, first, count).clone())
                    for k, v in held.layers
                ]
                self._cache.put(prompt, Prefix(layers, shift))

    def _remembered(self, held: KeyValues, prompts: Sequence[Prompt]) -> Tensor:
        """Known prompts are the first rows."""
        assert self._cache is not None
        for row, prompt in enumerate(prompts):
            prefix = self._cache[prompt]
            held.shift[row] += prefix.shift
            for (keys, values), (known_keys, known_values) in zip(held.layers, prefix.layers, strict=True):
                count = known_keys.shape[1]
                keys[row].narrow(1, held.length - 1 - count, count).copy_(known_keys)
                values[row].narrow(1, held.length - 1 - count, count).copy_(known_values)
        rows = slice(0, len(prompts))
        ids = torch.tensor([[tokens[-1]] for tokens, _ in prompts])
        first = held.length - max(len(tokens) for tokens, _ in prompts)
        positions = held.shift[rows] + held.length - 1
        seen = held.mask[rows, ..., first : held.length]
        return self._network(self._network.embedded(ids), positions, seen, held.part(rows, first))


def _groups(prompts: Sequence[Prompt], first: int) -> Iterator[_Group]:
    """``prompts`` from ``first`` on, in their order, which is that of their lengths."""
    group: list[Prompt] = []
    for row, prompt in enumerate(prompts[first:], first):
        least = min(_ALIKE * len(prompt[0]), len(prompt[0]) - _ANYWAY)
        if group and (prompt[1] or group[0][1] or len(group[0][0]) < least):
            yield _Group(row - len(group), group)
            group = []
        group.append(prompt)
    if group:
        yield _Group(len(prompts) - len(group), group)


def _causal(width: int, dtype: torch.dtype) -> Tensor:
    """(width, width), -inf where a token would see a later one."""
    return torch.full((width, width), float("-inf"), dtype=dtype).triu_(1)
