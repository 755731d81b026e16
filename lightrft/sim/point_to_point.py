"""Messages between two members of a group: posted, matched, delivered.

A send completes when its receive is posted: no backend buffers it. Messages between two ranks match in the order they
were posted; under ``gloo`` they match by tag.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightrft.sim.acceptance import advice, elsewhere
from lightrft.sim.buffers import BelowAutograd, poison
from lightrft.sim.calls import Call, Group, Message
from lightrft.sim.works import MessageWork

if TYPE_CHECKING:
    from lightrft.sim.process_group import SimProcessGroup
    from lightrft.sim.profiles import Profile

__all__ = ["astray", "other_tags", "post_receive", "post_send", "unmatched"]


def post_send(group: SimProcessGroup, call: Call, tensors: list[Tensor], peer: int, tag: int) -> MessageWork:
    """Post a send to member ``peer``; what is sent is what the tensors hold now."""
    shared, profile, me = group._group, group._profile, group._member
    with BelowAutograd(True):
        copies = [tensor.detach().clone() for tensor in tensors]
    message = Message(call, copies)
    message.source = me
    work = MessageWork(group._rank, message, tensors, copies, group._accept)
    named, any_source = shared.receives.get((me, peer)), shared.any_receives.get(peer)
    first, second = _find(named, tag, profile), _find(any_source, tag, profile)
    if first is not None and second is not None:  # both were posted by the same rank: the earlier one it is
        first, second = sorted((first, second), key=lambda receive: receive.call.sequence)
    receive = first or second
    if receive is not None:
        _take(shared.receives, (me, peer), receive)
        _take(shared.any_receives, peer, receive)
        _match(group, message, receive, later=call)
    else:
        shared.sends.setdefault((me, peer), deque()).append(message)
    return work


def post_receive(group: SimProcessGroup, call: Call, tensors: list[Tensor], peer: int, tag: int) -> MessageWork:
    """Post a receive from member ``peer`` (-1: from anybody) into ``tensors``, which hold poison until ``wait()``."""
    shared, profile, me = group._group, group._profile, group._member
    poison(tensors)
    message = Message(call, tensors)
    work = MessageWork(group._rank, message, tensors, (), group._accept)
    # The table holds the pairs in the order in which they came to have a message waiting.
    pairs = [(peer, me)] if peer >= 0 else [pair for pair in shared.sends if pair[1] == me]
    for pair in pairs:
        send = _find(shared.sends.get(pair), tag, profile)
        if send is not None:
            _take(shared.sends, pair, send)
            _match(group, send, message, later=call)
            return work
    if peer >= 0:
        shared.receives.setdefault((peer, me), deque()).append(message)
    else:
        shared.any_receives.setdefault(me, deque()).append(message)
    return work


def _find(queue: deque[Message] | None, tag: int, profile: Profile) -> Message | None:
    """The message in ``queue`` that one with this tag meets."""
    for message in queue or ():
        if profile.ordered_tags or message.call.tag == tag:
            return message
    return None


def _take(table: dict[Any, deque[Message]], key: Any, message: Message) -> None:
    """Remove ``message`` from its queue if it is there, and a queue that is empty from the table."""
    queue = table.get(key)
    if queue is not None and message in queue:
        queue.remove(message)
        if not queue:
            del table[key]


def _match(group: SimProcessGroup, send: Message, receive: Message, later: Call) -> None:
    problem = _difference(group._profile, send, receive)
    if problem is not None:
        group._world.disagree_pair(send.call, receive.call, problem, later)
    receive.tensors = send.tensors
    receive.source = send.source
    group._group.matches += 1
    send.call.match = receive.call.match = group._group.matches
    scheduler = group._world.scheduler
    for message in (send, receive):
        signature = message.call.signature
        if signature.device is not None:
            message.failure = elsewhere(signature.operation, signature.device)
        message.matched = True
        if message.waiter is not None:
            scheduler.wake(message.waiter)
            message.waiter = None


def _difference(profile: Profile, send: Message, receive: Message) -> str | None:
    sent, received = send.call.signature, receive.call.signature
    if send.call.tag != receive.call.tag and not profile.ignores_tags:
        return f"tags differ: sent with tag {send.call.tag}, received with tag {receive.call.tag}"
    if sent.device != received.device:
        device = sent.device or received.device or ""
        where = f"sent from {sent.device or 'cpu'}, received on {received.device or 'cpu'}"
        return f"devices differ: {where}. One tensor is on {device}, {advice(device)}"
    if sent.dtype != received.dtype:
        return f"dtypes differ: {sent.dtype} sent, {received.dtype} expected"
    if not _shapes_agree(profile, sent.shape, received.shape):
        return f"shapes differ: {list(sent.shape)} sent, {list(received.shape)} expected"
    return None


def _shapes_agree(profile: Profile, sent: Any, received: Any) -> bool:
    if profile.same_shape or not isinstance(sent, torch.Size) or not isinstance(received, torch.Size):
        return bool(sent == received)
    return sent.numel() == received.numel()


def other_tags(call: Call) -> list[Call]:
    """What was posted between the ends of a message that waits, the other way round, under another tag."""
    group, me = call.group, call.group.ranks.index(call.rank)
    if call.signature.operation == "recv":
        found = [queue for (source, target), queue in group.sends.items() if target == me]
    else:
        found = [queue for (source, _), queue in group.receives.items() if source == me]
    others = [message.call for queue in found for message in queue]
    return [other for other in others if other.tag != call.tag and call.peer in (other.rank, -1)]


def astray(group: Group) -> list[Call]:
    """Messages with a wrong peer, to judge by another one that waits and is alike but for its peer.

    Where one rank sends to a second, and a third expects just that from the first, the send goes to the wrong rank;
    where the second expects it from a third, the receive names the wrong one.
    """
    waiting = unmatched(group)
    sends = {call: (call.signature[1:], call.tag) for call in waiting if call.signature.operation == "send"}
    receives = {call: (call.signature[1:], call.tag) for call in waiting if call.signature.operation == "recv"}
    sent_to = {(kind, call.peer) for call, kind in sends.items()}
    expected_from = {(kind, call.peer) for call, kind in receives.items()}
    return [
        *(call for call, kind in sends.items() if {(kind, call.rank), (kind, -1)} & expected_from),
        *(call for call, kind in receives.items() if (kind, call.rank) in sent_to),
    ]


def unmatched(group: Group) -> list[Call]:
    """Sends and receives that never met their counterpart, in the order they were posted."""
    queues = [*group.sends.values(), *group.receives.values(), *group.any_receives.values()]
    return [message.call for queue in queues for message in queue]
