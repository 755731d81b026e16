"""Where each part of a parameter lies in the flat tensors that ZeRO makes of many parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Overlap", "Piece", "evenly_split", "laid_out", "overlaps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A run of elements of one parameter in one flat tensor.

    Attributes:
        name: of the parameter.
        start: index of the first element in the parameter, as a flat one.
        length: how many elements.
        flat: number of the flat tensor.
        offset: index of the first element in the flat tensor.
    """

    name: str
    start: int
    length: int
    flat: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Elements that are in a saved piece and in one that is wanted.

    Attributes:
        saved: where they are: rank that saved them, number of the flat tensor, slice of it.
        wanted: where they belong: number of the flat tensor, slice of it.
    """

    saved: tuple[int, int, slice]
    wanted: tuple[int, slice]


def laid_out(ranks: Sequence[Sequence[Mapping[str, tuple[int, int]]]]) -> list[list[Piece]]:
    """Pieces of ZeRO 1 and 2: the parameters of a group lie one after the other, cut into one run for each rank.

    Args:
        ranks: for each rank and group, offset in the rank's flat tensor and length, by name.

    Returns:
        The pieces of each rank.
    """
    passed: dict[str, int] = {}
    found = []
    for groups in ranks:
        pieces = []
        for flat, addresses in enumerate(groups):
            for name, (offset, length) in addresses.items():
                start = passed.get(name, 0)
                pieces.append(Piece(name=name, start=start, length=length, flat=flat, offset=offset))
                passed[name] = start + length
        found.append(pieces)
    return found


def evenly_split(groups: Iterable[Mapping[str, int]], rank: int, world_size: int) -> Iterator[Piece]:
    """Pieces of ZeRO 3: each parameter is cut into equal runs, the last one filled up.

    Args:
        groups: for each flat tensor the elements of its parameters, by name, in order.
        rank: whose pieces.
        world_size: ranks that share each parameter.
    """
    for flat, elements in enumerate(groups):
        offset = 0
        for name, count in elements.items():
            share = -(-count // world_size)
            length = min(share, count - rank * share)
            if length > 0:
                yield Piece(name=name, start=rank * share, length=length, flat=flat, offset=offset)
            offset += share


def overlaps(saved: Sequence[Sequence[Piece]], wanted: Iterable[Piece]) -> Iterator[Overlap]:
    """What has to be copied so that the wanted pieces are filled from the saved ones.

    Args:
        saved: pieces of each rank that saved.
        wanted: pieces of one rank that loads.
    """
    by_name: dict[str, list[tuple[int, Piece]]] = {}
    for rank, pieces in enumerate(saved):
        for piece in pieces:
            by_name.setdefault(piece.name, []).append((rank, piece))
    for piece in wanted:
        for rank, source in by_name.get(piece.name, []):
            first = max(piece.start, source.start)
            length = min(piece.start + piece.length, source.start + source.length) - first
            if length > 0:
                yield Overlap(
                    saved=(rank, source.flat, _run(source, first, length)),
                    wanted=(piece.flat, _run(piece, first, length)),
                )


def _run(piece: Piece, first: int, length: int) -> slice:
    begin = piece.offset + first - piece.start
    return slice(begin, begin + length)
