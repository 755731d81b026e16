"""Keys and values of a batch of sequences, padded on the left, and the prefix cache that they come from."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["KeyValues", "PrefixCache", "left_padded"]

Pair = tuple[Tensor, Tensor]


@dataclass(slots=True)
class KeyValues:
    """What forward passes over B sequences have left, with room for more.

    Attributes:
        layers: keys and values of each layer, (B, heads, room, size of a head).
        mask: (B, room), true where a token is; each sequence ends at ``length``.
        length: tokens and padding of each sequence so far.
    """

    layers: list[Pair]
    mask: Tensor
    length: int

    def select(self, rows: Tensor) -> KeyValues:
        """Some of the sequences, in this order; one may come several times."""
        layers = [(keys[rows], values[rows]) for keys, values in self.layers]
        return KeyValues(layers, self.mask[rows], self.length)

    def sequences(self, lengths: Sequence[int]) -> list[list[Pair]]:
        """Copies of keys and values of the last tokens of each sequence, as many as ``lengths`` says."""
        return [
            [
                (_last(keys[row], self.length, length), _last(values[row], self.length, length))
                for keys, values in self.layers
            ]
            for row, length in enumerate(lengths)
        ]

    @classmethod
    def of_sequences(cls, sequences: Sequence[Sequence[Pair]], room: int) -> KeyValues:
        """A batch of what ``sequences`` has copied."""
        lengths = [layers[0][0].shape[1] for layers in sequences]
        width = max(lengths)
        buffers = []
        for layer, (keys, values) in enumerate(sequences[0]):
            made = [each.new_zeros(len(sequences), each.shape[0], room, each.shape[2]) for each in (keys, values)]
            for row, (layers, length) in enumerate(zip(sequences, lengths, strict=True)):
                for buffer, part in zip(made, layers[layer], strict=True):
                    buffer[row, :, width - length : width] = part
            buffers.append((made[0], made[1]))
        return cls(buffers, left_padded(lengths, width, room), width)


def _last(part: Tensor, end: int, length: int) -> Tensor:
    return part[:, end - length : end].clone()


def left_padded(lengths: Sequence[int], width: int, room: int) -> Tensor:
    """Where the tokens of sequences are that end at ``width``, (B, room)."""
    places = torch.arange(room)
    begins = width - torch.tensor(lengths).unsqueeze(1)
    return (places >= begins) & (places < width)


class PrefixCache:
    """Keys and values of prompts that were seen, the oldest forgotten first.

    Args:
        limit: tokens that it holds at most.
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        self._limit = limit
        self._size = 0
        self._entries: OrderedDict[tuple[int, ...], list[Pair]] = OrderedDict()

    def __contains__(self, tokens: tuple[int, ...]) -> bool:
        return tokens in self._entries

    def __getitem__(self, tokens: tuple[int, ...]) -> list[Pair]:
        return self._entries[tokens]

    def put(self, tokens: tuple[int, ...], layers: list[Pair]) -> None:
        """Remember what was computed for a prompt."""
        self._entries[tokens] = layers
        self._size += len(tokens)
        while self._size > self._limit:
            oldest, _ = self._entries.popitem(last=False)
            self._size -= len(oldest)

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._size = 0
