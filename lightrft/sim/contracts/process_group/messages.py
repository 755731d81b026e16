"""PG401 and on: messages from one rank to another."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import Subject, everybodys, lists, mine


@contract.check(401)
def check_send_and_recv(subject: Subject) -> None:
    """`send` and `recv` carry a tensor from one rank to another, and `recv` says from which."""

    def body() -> object:
        tensor, source = mine(), None
        if dist.get_rank() == 0:
            dist.send(tensor, 1)
        if dist.get_rank() == 1:
            source = dist.recv(tensor, 0)
        return tensor.tolist(), source

    subject.expect(body, lambda rank, size: ([0.0, 1.0], 0) if rank == 1 else (everybodys(size)[rank], None), least=2)


@contract.check(402)
def check_isend_and_irecv(subject: Subject) -> None:
    """`isend` and `irecv` around a ring carry everybody's tensor to the next rank."""

    def body() -> object:
        rank, size, received = dist.get_rank(), dist.get_world_size(), torch.empty(2)
        works = [dist.isend(mine(), (rank + 1) % size), dist.irecv(received, (rank - 1) % size)]
        for work in works:
            assert work is not None
            work.wait()
        return received.tolist()

    subject.expect(body, lambda rank, size: everybodys(size)[rank - 1], least=2)


@contract.check(403)
def check_batches(subject: Subject) -> None:
    """`batch_isend_irecv` does the same, whatever the order of its operations on each rank."""

    def body() -> object:
        rank, size, received = dist.get_rank(), dist.get_world_size(), torch.empty(2)
        operations = [
            dist.P2POp(dist.isend, mine(), (rank + 1) % size),
            dist.P2POp(dist.irecv, received, (rank - 1) % size),
        ]
        for work in dist.batch_isend_irecv(operations if rank % 2 else operations[::-1]):
            work.wait()
        return received.tolist()

    subject.expect(body, lambda rank, size: everybodys(size)[rank - 1], ranks=4, least=2)


@contract.check(404)
def check_messages_keep_their_order(subject: Subject) -> None:
    """Messages from one rank to another arrive in the order in which they were sent."""

    def body() -> object:
        received = [torch.empty(1) for _ in range(4)]
        if dist.get_rank() == 0:
            works = [dist.isend(torch.full((1,), float(number)), 1) for number in range(4)]
        elif dist.get_rank() == 1:
            works = [dist.irecv(tensor, 0) for tensor in received]
        else:
            return None
        for work in reversed(works):
            assert work is not None
            work.wait()
        return lists(received) if dist.get_rank() else None

    subject.expect(body, lambda rank, _size: [[0.0], [1.0], [2.0], [3.0]] if rank == 1 else None, least=2)


@contract.check(405, "tags")
def check_tags(subject: Subject) -> None:
    """Among the messages of a sender, the tag chooses."""

    def body() -> object:
        received = [torch.empty(1) for _ in range(3)]
        if dist.get_rank() == 0:
            for work in [dist.isend(torch.full((1,), float(tag)), 1, tag=tag) for tag in range(3)]:
                assert work is not None
                work.wait()
        if dist.get_rank() == 1:
            for tag in (2, 0, 1):
                dist.recv(received[tag], 0, tag=tag)
        return lists(received) if dist.get_rank() == 1 else None

    subject.expect(body, lambda rank, _size: [[0.0], [1.0], [2.0]] if rank == 1 else None, least=2)


@contract.check(406, "any_source")
def check_messages_from_anybody(subject: Subject) -> None:
    """`recv` without a source takes a message from anybody, and says from whom."""

    def body() -> object:
        if dist.get_rank():
            dist.send(mine(), 0)
            return None
        found = {}
        for _ in range(dist.get_world_size() - 1):
            tensor = torch.empty(2)
            source = dist.recv(tensor)
            found[source] = tensor.tolist()
        return found

    subject.expect(
        body, lambda rank, size: None if rank else {owner: everybodys(size)[owner] for owner in range(1, size)}, least=2
    )


@contract.check(407)
def check_messages_in_groups(subject: Subject) -> None:
    """In a sub-group, source and destination are ranks of the world, or of the group where that is asked for."""

    def body() -> object:
        rank, group, received = dist.get_rank(), dist.new_group([1, 3]), torch.empty(2)
        if rank == 1:
            dist.send(mine(), 3, group=group)
            dist.recv(received, group=group, group_src=1)
        if rank == 3:
            dist.recv(received, 1, group=group)
            dist.send(mine(), group=group, group_dst=0)
        return received.tolist() if rank in (1, 3) else None

    subject.expect(body, lambda rank, _size: {1: [30.0, 31.0], 3: [10.0, 11.0]}.get(rank), ranks=4, least=4)


@contract.check(408)
def check_groups_do_not_mix_messages(subject: Subject) -> None:
    """Messages of two groups of the same ranks do not meet."""

    def body() -> object:
        groups, works = [dist.new_group([0, 1]), dist.new_group([0, 1])], []
        received = [torch.empty(1), torch.empty(1)]
        if dist.get_rank() == 0:
            works = [dist.isend(torch.full((1,), float(n)), 1, group=groups[n]) for n in (0, 1)]
        if dist.get_rank() == 1:
            works = [dist.irecv(received[n], 0, group=groups[n]) for n in (1, 0)]
        for work in works:
            assert work is not None
            work.wait()
        return lists(received) if dist.get_rank() == 1 else None

    subject.expect(body, lambda rank, _size: [[0.0], [1.0]] if rank == 1 else None, least=2)


@contract.check(409, "self_send")
def check_messages_to_oneself(subject: Subject) -> None:
    """A batch may send to its own rank."""

    def body() -> object:
        rank, received = dist.get_rank(), torch.empty(2)
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, mine(), rank), dist.P2POp(dist.irecv, received, rank)]
        ):
            work.wait()
        return received.tolist()

    subject.expect(body, lambda rank, size: everybodys(size)[rank])


@contract.check(410)
def check_a_sent_tensor_may_be_used_again(subject: Subject) -> None:
    """Once a send has been waited for, its tensor may change."""

    def body() -> object:
        tensor, received = mine(), [torch.empty(2), torch.empty(2)]
        for position in range(2):
            if dist.get_rank() == 0:
                dist.send(tensor, 1)
                tensor += 100
            if dist.get_rank() == 1:
                dist.recv(received[position], 0)
        return lists(received) if dist.get_rank() == 1 else None

    subject.expect(body, lambda rank, _size: [[0.0, 1.0], [100.0, 101.0]] if rank == 1 else None, least=2)


@contract.check(411)
def check_both_ways_at_once(subject: Subject) -> None:
    """Everybody may exchange with everybody at once."""

    def body() -> object:
        rank, size = dist.get_rank(), dist.get_world_size()
        received = {peer: torch.empty(2) for peer in range(size) if peer != rank}
        operations = [dist.P2POp(dist.irecv, tensor, peer) for peer, tensor in received.items()]
        operations += [dist.P2POp(dist.isend, mine() + 100 * peer, peer) for peer in received]
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return {peer: tensor.tolist() for peer, tensor in received.items()}

    subject.expect(
        body,
        lambda rank, size: {
            peer: [value + 100 * rank for value in row] for peer, row in enumerate(everybodys(size)) if peer != rank
        },
        ranks=4,
        least=2,
    )


@contract.check(412)
def check_messages_of_any_shape(subject: Subject) -> None:
    """Messages may have no elements, or no dimensions."""

    def body() -> object:
        tensors = [torch.empty(0, 3), torch.tensor(7.0 * dist.get_rank()), torch.full((2, 1, 2), 1.0 * dist.get_rank())]
        for tensor in tensors:
            if dist.get_rank() == 1:
                dist.send(tensor, 0)
            if dist.get_rank() == 0:
                dist.recv(tensor, 1)
        return lists(tensors) if dist.get_rank() == 0 else None

    subject.expect(body, lambda rank, _size: None if rank else [[], 7.0, [[[1.0, 1.0]], [[1.0, 1.0]]]], least=2)


@contract.check(413, "odd_dtype_messages")
def check_messages_of_odd_dtypes(subject: Subject) -> None:
    """Messages may hold integers that no reduction knows."""

    def body() -> object:
        found = []
        for dtype in (torch.int16, torch.uint16, torch.uint32, torch.uint64):
            tensor = torch.tensor([1, 2]).to(dtype) if dist.get_rank() == 0 else torch.tensor([0, 0]).to(dtype)
            if dist.get_rank() == 0:
                dist.send(tensor, 1)
            if dist.get_rank() == 1:
                dist.recv(tensor, 0)
                found.append(tensor.tolist())
        return found

    subject.expect(body, lambda rank, _size: [[1, 2]] * 4 if rank == 1 else [], least=2)
