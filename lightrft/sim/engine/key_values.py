"""Keys and values of a batch of sequences, padded on the left, and the prefix cache that they come from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["KeyValues", "Pair", "Prefix", "PrefixCache", "Prompt"]

Pair = tuple[Tensor, Tensor]


@dataclass(slots=True)
class KeyValues:
    """What forward passes over B sequences have left, with room for more; all sequences end at the same place.

    Attributes:
        layers: keys and values of each layer, (B, heads, room, size of a head).
        mask: (B, 1, 1, room), 0 where a token is, or will be, and -inf where padding is.
        length: tokens and padding of each sequence so far.
        shift: (B, 1), what is added to the place of a token to get its position.
    """

    layers: list[Pair]
    mask: Tensor
    length: int
    shift: Tensor

    @classmethod
    def empty(
        cls, shapes: Sequence[tuple[int, int, int]], lengths: Sequence[int], room: int, dtype: torch.dtype
    ) -> KeyValues:
        """Room for sequences, of which nothing has been computed; they will end together at the longest.

        Args:
            shapes: for each layer: heads, and sizes of a key and of a value.
            lengths: of the sequences.
            room: tokens that each sequence may have in the end, padding included.
            dtype: of keys, values and mask.
        """
        count, width = len(lengths), max(lengths)
        padding = width - torch.tensor(lengths).unsqueeze(1)
        mask = torch.zeros(count, room, dtype=dtype).masked_fill_(torch.arange(room) < padding, float("-inf"))
        layers = [
            (torch.zeros(count, heads, room, key, dtype=dtype), torch.zeros(count, heads, room, value, dtype=dtype))
            for heads, key, value in shapes
        ]
        return cls(layers, mask[:, None, None], width, -padding)

    def part(self, rows: slice | None, first: int) -> list[Pair]:
        """Views of keys and values of some sequences, or of all, from place ``first`` to ``length``."""
        count = self.length - first
        layers = self.layers if rows is None else [(k[rows], v[rows]) for k, v in self.layers]
        return [(k.narrow(2, first, count), v.narrow(2, first, count)) for k, v in layers]

    def keep(self, going: Tensor) -> Tensor:
        """Leave sequences out, in place, and padding that all others have. The last ones take the places of those.

        Args:
            going: (B,), which ones stay.

        Returns:
            Where each of them was.
        """
        count = int(going.sum())
        free = (~going[:count]).nonzero().flatten()
        last = going[count:].nonzero().flatten() + count
        places = torch.arange(count).index_copy_(0, free, last)
        self.mask, self.shift = self.mask[places], self.shift[places]
        first = _padding(self.mask)
        self.mask = self.mask[..., first:]
        for part in (part for pair in self.layers for part in pair):
            used = part.narrow(2, first, self.length - first)
            used[free] = used[last]
        self.layers = [(k[:count, :, first:], v[:count, :, first:]) for k, v in self.layers]
        self.length -= first
        self.shift += first
        return places

    def select(self, rows: Tensor, room: int) -> KeyValues:
        """Some of the sequences, in this order, one perhaps several times; padding that all have is left out.

        Args:
            rows: which ones.
            room: as in ``empty``, for what comes after the present end.
        """
        mask, shift = self.mask[rows], self.shift[rows]
        first = _padding(mask)
        count = self.length - first
        layers = [(_moved(k, rows, first, count, room), _moved(v, rows, first, count, room)) for k, v in self.layers]
        mask = mask[..., first : self.length + room]
        return KeyValues(layers, mask.contiguous(), count, shift + first)


def _padding(mask: Tensor) -> int:
    """How much of it all sequences have."""
    return int((mask[:, 0, 0] == 0).any(0).to(torch.int8).argmax())


def _moved(part: Tensor, rows: Tensor, first: int, count: int, room: int) -> Tensor:
    _, heads, _, size = part.shape
    made = part.new_empty(len(rows), heads, count + room, size)  # what comes after the present end is written first
    torch.index_select(part.narrow(2, first, count), 0, rows, out=made[:, :, :count])
    return made


@dataclass(frozen=True, slots=True)
class Prefix:
    """What was computed for a prompt, but for its last token.

    Attributes:
        layers: keys and values of each layer, (heads, tokens - 1, size).
        shift: of the last token, see ``KeyValues``, if nothing is before the prompt.
    """

    layers: list[Pair] = field(repr=False)
    shift: int = 0


Prompt = tuple[tuple[int, ...], tuple[Any, ...]]
"""Tokens, and what is seen."""


class PrefixCache:
    """Keys and values of prompts that were seen, the oldest forgotten first.

    Args:
        limit: tokens that it holds at most.
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        self._limit = limit
        self._size = 0
        self._entries: OrderedDict[Prompt, Prefix] = OrderedDict()

    def __contains__(self, prompt: Prompt) -> bool:
        return prompt in self._entries

    def __getitem__(self, prompt: Prompt) -> Prefix:
        return self._entries[prompt]

    def put(self, prompt: Prompt, prefix: Prefix) -> None:
        """Remember what was computed for a prompt."""
        self._entries[prompt] = prefix
        self._size += len(prompt[0])
        while self._size > self._limit:
            (oldest, _), _ = self._entries.popitem(last=False)
            self._size -= len(oldest)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._size = 0
