"""Calls and meetings: what each rank did, in order, and where ranks wait for one another.

A :class:`Call` is one operation of one rank on one group. The calls of all members with the same group and sequence
number meet in a :class:`Meeting`; it is complete when everybody has come.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from lightrft.sim.places import Place
    from lightrft.sim.scheduler import Task

__all__ = ["Call", "Event", "Group", "Meeting", "Signature", "Wait"]


class Signature(NamedTuple):
    """What has to agree between the members of a collective."""

    operation: str
    dtype: Any = None
    shape: Any = None
    reduce_op: str | None = None
    root: int | None = None
    sizes: Any = None
    device: str | None = None
    """Where the tensor is, if that is not the memory of the CPU: with nothing else than its dtype and shape."""

    def describe(self) -> str:
        """The call in one line, e.g. ``all_reduce(float32[4, 8], SUM)``."""
        inside = []
        if self.dtype is not None:
            where = f" on {self.device}" if self.device is not None else ""
            inside.append(f"{short_dtype(self.dtype)}{format_shape(self.shape)}{where}")
        if self.sizes is not None:
            inside.append(f"sizes {format_shape(self.sizes)}")
        if self.reduce_op is not None:
            inside.append(self.reduce_op)
        if self.root is not None:
            inside.append(f"root {self.root}")
        return f"{self.operation}({', '.join(inside)})"


def short_dtype(dtype: Any) -> str:
    """``float32`` for ``torch.float32``; several dtypes are joined by ``+``."""
    if isinstance(dtype, tuple):
        names = list(dict.fromkeys(short_dtype(d) for d in dtype))
        return "+".join(names)
    return str(dtype).removeprefix("torch.")


def format_shape(shape: Any) -> str:
    """``[4, 8]`` for a shape, ``[4, 8]x[2]`` for several."""
    if shape is None:
        return ""
    if len(shape) and not isinstance(shape[0], int):
        shown = "x".join(format_shape(s) for s in shape[:3])
        return shown + (f"x... ({len(shape)})" if len(shape) > 3 else "")
    return f"[{', '.join(map(str, shape))}]"


class Event(NamedTuple):
    """One entry of ``world.trace``.

    Attributes:
        rank: global rank.
        operation: name of the call.
        group: name of the group.
        sequence: position among the rank's calls on this group, from 1.
        shape: shape of the tensor, or of the tensors; ``()`` if there is none.
        dtype: name of the dtype, ``""`` if there is none.
        place: file and line in the user's code.
    """

    rank: int
    operation: str
    group: str
    sequence: int
    shape: Any
    dtype: str
    place: Place


class Call:
    """One operation of one rank on one group.

    Attributes:
        thread: number of the task that made it.
    """

    __slots__ = (
        "async_op",
        "done",
        "gives_up_at",
        "group",
        "match",
        "peer",
        "place",
        "rank",
        "sequence",
        "signature",
        "since",
        "sizes",
        "tag",
        "thread",
    )

    def __init__(
        self,
        rank: int,
        group: Group,
        sequence: int,
        signature: Signature,
        place: Place,
        since: int,
        thread: int,
        peer: int | None = None,
        tag: int = 0,
    ) -> None:
        self.rank = rank
        self.group = group
        self.sequence = sequence
        self.signature = signature
        self.place = place
        self.since = since
        self.done = False
        self.gives_up_at: int | None = None
        """Virtual time (ns) at which a barrier with a timeout of its own stops waiting."""
        self.async_op = False
        self.peer = peer
        self.tag = tag
        self.thread = thread
        self.match = 0
        """Number, within the group, of the pair that a send or receive has become part of; 0 until then."""
        self.sizes: tuple[int, int] | None = None
        """Elements sent and received by an all-to-all, whose signature does not say it."""

    def describe(self) -> str:
        """The operation with its arguments, and the group it ran on."""
        text = self.signature.describe()
        if self.peer is not None:
            peer = "any rank" if self.peer < 0 else f"rank {self.peer}"
            direction = "to" if self.signature.operation == "send" else "from"
            text = f"{text[:-1]}, {direction} {peer}{f', tag {self.tag}' if self.tag else ''})"
        return f"{text} on {self.group.title}, #{self.sequence}"

    @property
    def blocks(self) -> bool:
        """Whether it returns only when it is complete, and not a handle at once."""
        return not self.async_op and self.peer is None

    def event(self) -> Event:
        """The call as an entry of the trace."""
        signature = self.signature
        shape = signature.shape
        shape = () if shape is None else tuple(tuple(s) if not isinstance(s, int) else s for s in shape)
        dtype = short_dtype(signature.dtype) if signature.dtype is not None else ""
        return Event(self.rank, signature.operation, self.group.name, self.sequence, shape, dtype, self.place)


class Wait:
    """Waiting that a rank does apart from a call: the ``wait()`` of a handle, or a barrier that may give up.

    Attributes:
        thread: number of the task that waits.
        since: virtual time (ns) at which it began; ``until``, at which it returned, -1 if it never did.
        before: how many calls and waits the ranks had begun when it began; ``after``, when it returned.
    """

    __slots__ = ("after", "before", "call", "since", "thread", "until")

    def __init__(self, call: Call, thread: int, since: int, before: int) -> None:
        self.call = call
        self.thread = thread
        self.since = since
        self.before = before
        self.until = self.after = -1


class Meeting:
    """The calls of a group's members with one sequence number."""

    __slots__ = ("arrived", "calls", "complete", "first", "inputs", "outputs", "results", "sequence", "waiters")

    def __init__(self, sequence: int, size: int, first: Call) -> None:
        self.sequence = sequence
        self.first = first
        self.calls: list[Call | None] = [None] * size
        self.inputs: list[Any] = [None] * size
        self.outputs: list[Any] = [None] * size
        self.arrived = 0
        self.complete = False
        self.results: list[Any] | None = None
        self.waiters: list[Task] = []


class Message:
    """A posted send or receive that has not met its counterpart."""

    __slots__ = ("call", "failure", "matched", "source", "tensors", "waiter")

    def __init__(self, call: Call, tensors: list[Tensor]) -> None:
        self.call = call
        self.tensors = tensors
        self.matched = False
        self.source = -1
        self.waiter: Task | None = None
        self.failure: Exception | None = None
        """What waiting for it raises: it has met its counterpart, and cannot be delivered."""


class Group:
    """One process group, as all its members share it.

    Attributes:
        name: the name torch gave it; ``0`` is the default group.
        ranks: global ranks of the members, in group order.
        timeout: nanoseconds of virtual time after which a collective that still waits has failed.
    """

    def __init__(self, name: str, ranks: tuple[int, ...], backend: str, timeout: int, description: str) -> None:
        self.name = name
        self.ranks = ranks
        self.size = len(ranks)
        self.backend = backend
        self.timeout = timeout
        self.description = description
        self.meetings: dict[int, Meeting] = {}
        self.sends: dict[tuple[int, int], deque[Message]] = {}
        self.receives: dict[tuple[int, int], deque[Message]] = {}
        self.any_receives: dict[int, deque[Message]] = {}
        self.matches = 0

    def forget(self) -> None:
        """Drop what was never completed, with its tensors."""
        for table in (self.meetings, self.sends, self.receives, self.any_receives):
            table.clear()

    @property
    def title(self) -> str:
        """How a report names the group."""
        if self.description == "default_pg":
            return "the default group"
        ranks = ", ".join(map(str, self.ranks[:6])) + (", ..." if self.size > 6 else "")
        what = f" {self.description!r}" if self.description not in ("", "undefined") else ""
        return f"group {self.name[:12]}{what} of ranks [{ranks}]"
