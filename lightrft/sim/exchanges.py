"""Collectives and messages, as the calls of a run make them up: which calls belong together, and how large they are.

A collective counts once, however many ranks take part; a send and its receive are one message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.sim.calls import Call

__all__ = ["Exchange", "exchanges", "payload"]

_OF_ONE_MEMBER = frozenset(
    {
        "all_gather",
        "all_gather_coalesced",
        "all_gather_single",
        "all_gather_single_coalesced",
        "gather",
        "reduce_scatter",
        "scatter",
    }
)
"""Operations whose signature has the shape of one member's part."""


def payload(call: Call) -> int:
    """Bytes of what a member hands in or of what it gets, whichever is larger: the column "size" of nccl-tests.

    Of operations with a root it is what the root hands in or gets; of an all-to-all, which may be uneven, it is that of
    the rank that calls.
    """
    dtype, shape = call.signature.dtype, call.signature.shape
    if dtype is None:
        return 0
    if call.sizes is not None:
        return int(max(call.sizes) * dtype.itemsize)
    if not shape or isinstance(shape[0], int):
        size = int(prod(shape) * dtype.itemsize)
    elif isinstance(dtype, tuple):  # several tensors at once
        size = sum(int(prod(one) * each.itemsize) for one, each in zip(shape, dtype, strict=True))
    else:  # the parts of all members, which differ
        return int(sum(map(prod, shape)) * dtype.itemsize)
    return size * call.group.size if call.signature.operation in _OF_ONE_MEMBER else size


class Exchange:
    """A collective or a message.

    Attributes:
        calls: the calls that belong to it, in the order in which they were made.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []

    @property
    def payload(self) -> int:
        """Bytes; of an uneven all-to-all those of the rank with most."""
        return max(map(payload, self.calls))

    @property
    def is_message(self) -> bool:
        """Whether it is a send and a receive, or one of them that never met the other."""
        return self.calls[0].peer is not None

    @property
    def complete(self) -> bool:
        """Whether everybody has come, and nobody disagreed."""
        calls, first = self.calls, self.calls[0]
        if self.is_message:
            return bool(first.match)
        came = len(calls) == first.group.size and any(call.done or call.async_op for call in calls)
        return came and all(call.signature == first.signature for call in calls)


def exchanges(calls: Iterable[Call]) -> list[Exchange]:
    """The collectives and messages that ``calls`` make up, in the order in which they began."""
    found: dict[Any, Exchange] = defaultdict(Exchange)
    for call in calls:
        key: Any = (call.group, call.sequence)
        if call.peer is not None:
            key = (call.group, "message", call.match) if call.match else call
        found[key].calls.append(call)
    return list(found.values())
