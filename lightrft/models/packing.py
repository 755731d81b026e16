"""Which samples share a row, and which rank gets which rows. Pure functions of lengths."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

from lightrft.errors import ConfigError

__all__ = ["balance", "pack", "pack_for_ranks"]


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Put samples into as few rows of ``capacity`` tokens as best-fit decreasing finds.

    Each sample, the longest first, goes into the row in which it leaves the least room. That takes at most 11/9 of the
    fewest possible rows and one more (Johnson, "Near-optimal bin packing algorithms", 1973).

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a row.

    Returns:
        The numbers of the samples of each row, ascending. A sample without tokens is in no row. The same lengths give
        the same rows.

    Raises:
        ConfigError: a sample is longer than a row, or a length is negative.
    """
    for number, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ConfigError(f"sample {number} has {length} tokens: expected 0 to {capacity}, the length of a row")
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # room left, and the row that has it; sorted
    for number in _longest_first(lengths):
        length = lengths[number]
        if length == 0:
            break
        place = bisect.bisect_left(room, (length, -1))
        if place == len(room):
            rows.append([number])
            bisect.insort(room, (capacity - length, len(rows) - 1))
            continue
        left, row = room.pop(place)
        rows[row].append(number)
        bisect.insort(room, (left - length, row))
    return [sorted(row) for row in rows]


def balance(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Share samples out so that the parts have nearly the same number of tokens.

    Each sample, the longest first, goes to the part with the fewest tokens so far. No part then has more than 4/3 of
    what the largest one of the best sharing has (Graham, "Bounds on multiprocessing timing anomalies", 1969).

    Args:
        lengths: tokens of each sample.
        parts: how many parts; some may stay empty.

    Returns:
        The numbers of the samples of each part, ascending.

    Raises:
        ConfigError: ``parts`` is below 1.
    """
    return _dealt(lengths, parts, len(lengths))


def pack_for_ranks(lengths: Sequence[int], capacity: int, ranks: int) -> list[list[list[int]]]:
    """Pack samples, and share the rows out over ranks: each gets the same number of rows, and nearly as many tokens.

    Ranks that run a different number of passes through a sharded model wait for each other for ever. Where the rows do
    not come out even, the fullest ones are divided; with fewer samples than that takes, some rows are empty.

    Args:
        lengths: tokens of each sample.
        capacity: tokens of a row.
        ranks: how many ranks.

    Returns:
        For each rank its rows, each with the numbers of its samples.

    Raises:
        ConfigError: a sample is longer than a row, or ``ranks`` is below 1.
    """
    rows = pack(lengths, capacity)
    each = -(-len(rows) // ranks) if ranks > 0 else 0
    while len(rows) < each * ranks:
        rows += _divided(rows, lengths)
    shares = _dealt([sum(lengths[number] for number in row) for row in rows], ranks, each)
    return [[rows[number] for number in share] for share in shares]


def _divided(rows: list[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Take about half of the tokens out of the row that has most of them, of those with two samples or more."""
    full = [row for row in rows if len(row) > 1]
    if not full:
        return [[]]
    most = max(full, key=lambda row: sum(lengths[number] for number in row))
    kept, taken = ([most[place] for place in part] for part in balance([lengths[number] for number in most], parts=2))
    most[:] = kept
    return [taken]


def _dealt(lengths: Sequence[int], parts: int, most: int) -> list[list[int]]:
    """``balance``, with at most ``most`` samples in a part."""
    if parts < 1:
        raise ConfigError(f"got {parts} ranks or parts: expected 1 at least")
    shares: list[list[int]] = [[] for _ in range(parts)]
    open_parts = [(0, part) for part in range(parts)]
    for number in _longest_first(lengths):
        tokens, part = heapq.heappop(open_parts)
        shares[part].append(number)
        if len(shares[part]) < most:
            heapq.heappush(open_parts, (tokens + lengths[number], part))
    return [sorted(share) for share in shares]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
