"""What the ranks did, in the format of PyTorch's NCCL flight recorder: ``torchfrtrace`` reads it.

One pickle per rank, version 2.10 of the format, as torch 2.11 to 2.13 write and read it. Three things are told as NCCL
would tell them, and not as the simulator does:

- an operation is ``completed`` when all members have come, whether or not a rank has already waited for it;
- a pair of ranks that sends and receives has a group of its own for each direction, as NCCL has a communicator for each
  pair: the analyzer expects every member of a group in every entry;
- a group that was destroyed and made again under its old name is another group.
"""

from __future__ import annotations

import os
import pickle
from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lightrft.sim.clock import EPOCH_NS

if TYPE_CHECKING:
    from lightrft.sim.calls import Call, Group
    from lightrft.sim.world import SimWorld

__all__ = ["write"]

_VERSION = "2.10"

_NAMES = {
    "all_gather_coalesced": "ALLGATHER_coalesced",
    "all_gather_single": "_all_gather_base",
    "all_gather_single_coalesced": "all_gather_into_tensor_coalesced",
    "all_reduce_coalesced": "allreduce_coalesced",
    "all_to_all_single": "all_to_all",
    "barrier": "all_reduce_barrier",
    "monitored_barrier": "all_reduce_barrier",
    "reduce_scatter_single": "_reduce_scatter_base",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "split_group": "split" if torch.__version__ >= "2.12" else "all_reduce_barrier",
}
"""NCCL's names of operations, where they are not ours. The analyzer of torch 2.11 knows all of them."""

_DTYPES = {
    torch.bool: "Bool",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.uint16: "UInt16",
    torch.uint32: "UInt32",
    torch.uint64: "UInt64",
    torch.float16: "Half",
    torch.float32: "Float",
    torch.float64: "Double",
    torch.bfloat16: "BFloat16",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
    torch.float8_e4m3fn: "Float8_e4m3fn",
    torch.float8_e4m3fnuz: "Float8_e4m3fnuz",
    torch.float8_e5m2: "Float8_e5m2",
    torch.float8_e5m2fnuz: "Float8_e5m2fnuz",
}

Sizes = list[list[int]]


def write(world: SimWorld, prefix: str) -> list[str]:
    """Write the latest run of ``world``, one file per rank; folders are made as needed.

    Args:
        world: the world; its run may have failed, or may never have begun.
        prefix: prefix of the file names; rank ``r`` is written to ``{prefix}{r}``.

    Returns:
        the names of the files.
    """
    folder = os.path.dirname(prefix)
    if folder:
        os.makedirs(folder, exist_ok=True)
    record = _Record(world.size, world.groups, world._calls)
    names = [f"{prefix}{rank}" for rank in range(world.size)]
    for rank, name in enumerate(names):
        with open(name, "wb") as file:
            pickle.dump(record.dump(rank), file)
    return names


class _Channel(NamedTuple):
    """A group as the record shows it: one of the run, or a pair of ranks that exchanges messages."""

    name: str
    description: str
    ranks: tuple[int, ...]


class _Entry(NamedTuple):
    """A call with what the record has to say about it."""

    call: Call
    channel: _Channel
    sequence: int
    operation: str
    completed_at: int | None


class _Record:
    """Everything that the files say, by rank."""

    def __init__(self, size: int, groups: dict[tuple[str, int, tuple[int, ...]], Group], calls: Sequence[Call]) -> None:
        self._channels = {group: _channel(group, epoch) for (_, epoch, _), group in groups.items()}
        self._entries: list[list[_Entry]] = [[] for _ in range(size)]
        self._config: list[dict[_Channel, None]] = [{} for _ in range(size)]
        for channel in self._channels.values():
            self._join(channel)
        completed = _completed(call for call in calls if call.peer is None)
        messages = _Messages(self._channels, calls)
        for call in calls:
            if call.peer is None:
                entry = self._collective(call, completed.get((call.group, call.sequence)))
            else:
                entry = messages.entry(call)
                self._join(entry.channel)
            self._entries[call.rank].append(entry)

    def _join(self, channel: _Channel) -> None:
        for rank in channel.ranks:
            self._config[rank][channel] = None

    def _collective(self, call: Call, completed_at: int | None) -> _Entry:
        operation = _NAMES.get(call.signature.operation, call.signature.operation)
        if _uneven(call):
            operation = "_broadcast_oop" if operation == "all_gather" else "_reduce_oop"
        return _Entry(call, self._channels[call.group], call.sequence, operation, completed_at)

    def dump(self, rank: int) -> dict[str, Any]:
        """What the file of ``rank`` holds."""
        numbers = {channel: number for number, channel in enumerate(self._config[rank])}
        entries = self._entries[rank]
        return {
            "version": _VERSION,
            "comm_lib_version": "lightrft.sim",
            "pg_config": {channel.name: _config(channel) for channel in numbers},
            "pg_status": _statuses(numbers, entries),
            "entries": [_entry(position, entry, numbers[entry.channel]) for position, entry in enumerate(entries)],
        }


def _channel(group: Group, epoch: int) -> _Channel:
    again = f" (made again, {epoch})" if epoch else ""
    return _Channel(f"{group.name}{again}", group.description or "undefined", group.ranks)


def _completed(calls: Iterable[Call]) -> dict[tuple[Group, int], int]:
    """Virtual time at which each collective was complete; those that never were are left out."""
    meetings: dict[tuple[Group, int], list[Call]] = defaultdict(list)
    for call in calls:
        meetings[call.group, call.sequence].append(call)
    return {key: max(call.since for call in met) for key, met in meetings.items() if _is_complete(key[0], met)}


def _is_complete(group: Group, met: list[Call]) -> bool:
    if any(call.done for call in met):
        return True
    # Nobody has waited yet. Whether what an all-to-all sends fits what is received shows only in its result.
    pending = any(call.async_op for call in met) and all(call.sizes is None for call in met)
    return pending and len(met) == group.size and all(call.signature == met[0].signature for call in met)


class _Messages:
    """Sends and receives: which belong together, and their numbers on the channel between their ranks."""

    def __init__(self, channels: dict[Group, _Channel], calls: Sequence[Call]) -> None:
        self._channels = channels
        self._pairs: dict[tuple[Group, int], list[Call]] = defaultdict(list)
        self._numbers: dict[Call, int] = {}
        posted = [call for call in calls if call.peer is not None]
        for call in posted:
            if call.match:
                self._pairs[call.group, call.match].append(call)
        counts: dict[_Channel, int] = defaultdict(int)
        for _, pair in sorted(self._pairs.items(), key=lambda item: item[0][1]):
            channel = self._channel(pair[0])
            counts[channel] += 1
            self._numbers.update(dict.fromkeys(pair, counts[channel]))
        pending: dict[tuple[_Channel, int], int] = defaultdict(int)
        for call in posted:
            if not call.match:
                channel = self._channel(call)
                pending[channel, call.rank] += 1
                self._numbers[call] = counts[channel] + pending[channel, call.rank]

    def entry(self, call: Call) -> _Entry:
        """The entry of a send or receive."""
        channel = self._channel(call)
        pair = self._pairs[call.group, call.match] if call.match else [call]
        sender, receiver = _ends(pair)
        source, target = (sorted(channel.ranks).index(rank) for rank in (sender, receiver))
        sends = call.signature.operation == "send"
        operation = f"send {source}->{target}" if sends else f"recv {target}<-{source}"
        completed = max(one.since for one in pair) if call.match or call.done else None
        return _Entry(call, channel, self._numbers[call], operation, completed)

    def _channel(self, call: Call) -> _Channel:
        group = self._channels[call.group]
        pair = self._pairs[call.group, call.match] if call.match else [call]
        if not call.match and call.peer == -1:
            return _Channel(f"{group.name}:any->{call.rank}", f"{group.description}, any to {call.rank}", group.ranks)
        sender, receiver = _ends(pair)
        tag = f", tag {call.tag}" if call.tag and not call.match else ""  # it waits for a counterpart with this tag
        name = f"{group.name}:{sender}->{receiver}{tag}"
        ranks = tuple(sorted({sender, receiver}))
        return _Channel(name, f"{group.description}, {sender} to {receiver}{tag}", ranks)


def _ends(pair: list[Call]) -> tuple[int, int]:
    """Sender and receiver, by global rank; a receive that nobody answered may have its receiver at both ends."""
    call = pair[0]
    assert call.peer is not None
    other = pair[1].rank if len(pair) > 1 else call.peer if call.peer >= 0 else call.rank
    return (call.rank, other) if call.signature.operation == "send" else (other, call.rank)


# -- one entry --------------------------------------------------------------------------------------------------------


def _entry(number: int, entry: _Entry, channel: int) -> dict[str, Any]:
    call, completed = entry.call, entry.completed_at
    dtypes = _dtypes(call)
    sent, received = _sizes(call)
    is_message = call.peer is not None
    return {
        "record_id": number,
        "pg_id": channel,
        "process_group": (entry.channel.name, entry.channel.description),
        "collective_seq_id": entry.sequence,
        "p2p_seq_id": entry.sequence if is_message else 0,
        "op_id": entry.sequence,
        "profiling_name": f"nccl:{entry.operation}",
        "time_created_ns": EPOCH_NS + call.since,
        "input_sizes": sent,
        "input_dtypes": dtypes if sent else [],
        "output_sizes": received,
        "output_dtypes": dtypes if received else [],
        "state": "scheduled" if completed is None else "completed",
        "time_discovered_started_ns": None if completed is None else EPOCH_NS + completed,
        "time_discovered_completed_ns": None if completed is None else EPOCH_NS + completed,
        "retired": completed is not None,
        "timeout_ms": call.group.timeout // 1_000_000,
        "is_p2p": is_message,
        "frames": [{"name": call.place.function, "filename": call.place.file, "line": call.place.line}],
        "thread_id": str(call.rank),
        "thread_name": f"rank {call.rank}",
    }


def _config(channel: _Channel) -> dict[str, str]:
    return {"name": channel.name, "desc": channel.description, "ranks": str(list(channel.ranks))}


def _statuses(numbers: dict[_Channel, int], entries: Sequence[_Entry]) -> dict[str, dict[str, int]]:
    """How far a rank has come on each of its groups; -1 where nothing has happened."""
    fields = ("last_enqueued_collective", "last_started_collective", "last_completed_collective")
    found = {number: dict.fromkeys(fields, -1) for number in numbers.values()}
    for entry in entries:
        status = found[numbers[entry.channel]]
        for field in fields if entry.completed_at is not None else fields[:1]:
            status[field] = max(status[field], entry.sequence)
    return {str(number): status for number, status in found.items()}


def _dtypes(call: Call) -> list[str]:
    dtype = call.signature.dtype
    if dtype is None:
        return ["Float"]  # a barrier is an all_reduce of one number
    every = dict.fromkeys(dtype) if isinstance(dtype, tuple) else [dtype]
    return [_DTYPES.get(one, str(one).removeprefix("torch.")) for one in every]


def _shapes(call: Call) -> Sizes:
    """The shapes in the signature of a call: of one tensor, or of several."""
    shape = call.signature.shape
    if shape is None:
        return []
    several = len(shape) > 0 and not isinstance(shape[0], int)
    return [list(one) for one in shape] if several else [list(shape)]


def _uneven(call: Call) -> bool:
    """Whether members contribute or receive parts of different sizes, for which NCCL has no single operation."""
    if call.signature.operation not in ("all_gather", "reduce_scatter"):
        return False
    shapes = _shapes(call)
    return any(shape != shapes[0] for shape in shapes)


def _sizes(call: Call) -> tuple[Sizes, Sizes]:
    """Shapes of the inputs and outputs as NCCL records them: lists of equal tensors as one tensor."""
    shapes, size = _shapes(call), call.group.size
    operation, at_root = call.signature.operation, call.signature.root == call.rank
    if call.sizes is not None:
        return [[call.sizes[0]]], [[call.sizes[1]]]
    if not shapes:
        return [[1]], [[1]]
    stacked = [[size, *shape] for shape in shapes]
    if operation in ("send", "recv"):
        return (shapes, []) if operation == "send" else ([], shapes)
    if _uneven(call):
        return shapes, shapes
    if operation == "gather":
        return shapes, stacked if at_root else []
    if operation == "scatter":
        return stacked if at_root else [], shapes
    if operation == "reduce_scatter":
        return [[size, *shapes[0]]], [shapes[0]]
    if operation.startswith("all_gather"):
        return shapes, stacked
    if operation.startswith("reduce_scatter_single"):
        return shapes, [[prod(shape) // size] for shape in shapes]
    return shapes, shapes
