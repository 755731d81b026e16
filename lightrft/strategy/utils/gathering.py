"""How values are gathered from ranks that hold different amounts of them, in one collective besides the agreement."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.strategy.utils.leaves import Layout, Leaf, check_values, disagreement, fingerprint, refusal, tensor_kind

__all__ = ["Gathering"]

_ROOM = 30
"""First dimensions that fit into the header; those of more values follow in a second collective."""


class Gathering:
    """One call of ``all_gather`` on one rank.

    Args:
        leaves: the values, in the order in which all ranks have them.
        world: number of ranks in ``group``; with 1 there is no collective.
        group: who takes part.
        device: where tensors travel.
    """

    def __init__(self, leaves: list[Leaf], world: int, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._leaves = leaves
        self._refusals = {leaf.name: why for leaf in leaves if (why := refusal(leaf.value))}
        self._parts = [] if self._refusals else [_at_least_1d(leaf.value) for leaf in leaves]
        self._world = world
        self._group = group
        self._device = device

    def run(self) -> dict[tuple[Any, ...], Tensor]:
        """What was gathered, by the path of each leaf."""
        columns = [[part] for part in self._parts]
        if self._world == 1:
            check_values(self._refusals)
        else:
            columns = self._exchange(self._lengths())
        return {leaf.path: torch.cat(column) for leaf, column in zip(self._leaves, columns, strict=True)}

    def _lengths(self) -> list[list[int]]:
        """The first dimension of every value, by rank; raises on every rank where they disagree about anything else."""
        layout: Layout = {leaf.name: _kind(leaf) for leaf in self._leaves} | self._refusals
        mine = [len(part) for part in self._parts]
        header = [fingerprint(layout, 62), *mine[:_ROOM], *[0] * (_ROOM - len(mine))]
        headers = self._gathered(torch.tensor(header, device=self._device)).tolist()
        if len({each[0] for each in headers}) > 1:
            raise disagreement("all_gather", layout, self._group)
        check_values(self._refusals)
        lengths = [each[1 : 1 + len(mine)] for each in headers]
        if len(mine) > _ROOM:
            more = self._gathered(torch.tensor(mine[_ROOM:], device=self._device)).tolist()
            lengths = [first + rest for first, rest in zip(lengths, more, strict=True)]
        return lengths

    def _exchange(self, lengths: list[list[int]]) -> list[list[Tensor]]:
        """The parts of every value, by rank. All travel as bytes, in one tensor as long as the longest of any rank."""
        row_bytes = [math.prod(part.shape[1:]) * part.itemsize for part in self._parts]
        sizes = [[length * row for length, row in zip(each, row_bytes, strict=True)] for each in lengths]
        longest = max(map(sum, sizes))
        padded = torch.zeros(longest, dtype=torch.uint8, device=self._device)
        mine = [part.reshape(-1).view(torch.uint8).to(self._device) for part in self._parts]
        if mine:
            padded[: sum(map(len, mine))] = torch.cat(mine)
        everyone = self._gathered(padded) if longest else padded.expand(self._world, 0)
        columns: list[list[Tensor]] = [[] for _ in self._parts]
        for row, rank_lengths, rank_sizes in zip(everyone, lengths, sizes, strict=True):
            pieces = row[: sum(rank_sizes)].split(rank_sizes)
            for column, part, length, piece in zip(columns, self._parts, rank_lengths, pieces, strict=True):
                aligned = piece.to(part.device, copy=True).view(part.dtype)
                column.append(aligned.reshape(length, *part.shape[1:]))
        return columns

    def _gathered(self, mine: Tensor) -> Tensor:
        """``mine`` of every rank, stacked."""
        everyone = torch.empty((self._world, *mine.shape), dtype=mine.dtype, device=mine.device)
        dist.all_gather(list(everyone), mine, group=self._group)
        return everyone


def _at_least_1d(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value if value.dim() else value.reshape(1)
    return torch.tensor([value], dtype=torch.float64 if isinstance(value, float) else None)


def _kind(leaf: Leaf) -> str:
    if not isinstance(leaf.value, Tensor):
        return f"a Python {type(leaf.value).__name__}"
    return tensor_kind(leaf.value, ["any", *leaf.value.shape[1:]] if leaf.value.dim() else [])
