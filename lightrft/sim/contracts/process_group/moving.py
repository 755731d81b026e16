"""PG201 and on: collectives that move data as it is."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import (
    Subject,
    all_gather_single,
    everybodys,
    flat,
    last_rank,
    lists,
    mine,
    reduce_scatter_single,
    total,
)


@contract.check(201)
def check_broadcast(subject: Subject) -> None:
    """`broadcast` gives every rank the tensor of its root, for every root."""

    def body() -> object:
        found = []
        for root in range(dist.get_world_size()):
            tensor = mine()
            dist.broadcast(tensor, root)
            found.append(tensor.tolist())
        return found

    subject.expect(body, lambda _rank, size: everybodys(size))


@contract.check(202)
def check_all_gather(subject: Subject) -> None:
    """`all_gather` gives every rank everybody's tensor, in rank order."""

    def body() -> object:
        outputs = [torch.empty(2) for _ in range(dist.get_world_size())]
        dist.all_gather(outputs, mine())
        return lists(outputs)

    subject.expect(body, lambda _rank, size: everybodys(size))


@contract.check(203)
def check_all_gather_single(subject: Subject) -> None:
    """`all_gather_into_tensor` puts everybody's tensors end to end along dimension 0, in rank order."""

    def body() -> object:
        size = dist.get_world_size()
        flat, rows = torch.empty(2 * size), torch.empty(2 * size, 2)
        all_gather_single(flat, mine())
        all_gather_single(rows, mine(4).reshape(2, 2))
        return flat.tolist(), rows.reshape(-1).tolist()

    subject.expect(body, lambda _rank, size: (flat(everybodys(size)), flat(everybodys(size, 4))))


@contract.check(204, "uneven_all_gather")
def check_uneven_all_gather(subject: Subject) -> None:
    """The tensors of an `all_gather` may differ in size from rank to rank."""

    def body() -> object:
        outputs = [torch.empty(owner + 1) for owner in range(dist.get_world_size())]
        dist.all_gather(outputs, mine(dist.get_rank() + 1))
        return lists(outputs)

    subject.expect(
        body, lambda _rank, size: [everybodys(size, 3)[owner][: owner + 1] for owner in range(size)], least=2
    )


@contract.check(205, "stacked")
def check_stacked_all_gather_single(subject: Subject) -> None:
    """`all_gather_into_tensor` stacks everybody's tensors in an output with one dimension more."""

    def body() -> object:
        output = torch.empty(dist.get_world_size(), 2)
        all_gather_single(output, mine())
        return output.tolist()

    subject.expect(body, lambda _rank, size: everybodys(size))


@contract.check(206, "stacked", probed=False)
def check_stacked_reduce_scatter_single(subject: Subject) -> None:
    """`reduce_scatter_tensor` takes an input with one dimension more, a row for each rank."""

    def body() -> object:
        size, output = dist.get_world_size(), torch.empty(2)
        reduce_scatter_single(output, mine(2 * size).reshape(size, 2))
        return output.tolist()

    subject.expect(body, lambda rank, size: total(size, 2 * size)[2 * rank : 2 * rank + 2])


@contract.check(207)
def check_gather(subject: Subject) -> None:
    """`gather` gives its root everybody's tensor, in rank order."""

    def body() -> object:
        at_root = dist.get_rank() == last_rank()
        outputs = [torch.empty(2) for _ in range(dist.get_world_size())] if at_root else None
        dist.gather(mine(), outputs, last_rank())
        return lists(outputs or [])

    subject.expect(body, lambda rank, size: everybodys(size) if rank == size - 1 else [])


@contract.check(208)
def check_scatter(subject: Subject) -> None:
    """`scatter` gives rank `r` the `r`-th tensor of its root."""

    def body() -> object:
        output, at_root = torch.empty(2), dist.get_rank() == last_rank()
        inputs = [mine() + 100 * owner for owner in range(dist.get_world_size())] if at_root else None
        dist.scatter(output, inputs, last_rank())
        return output.tolist()

    subject.expect(body, lambda rank, size: [value + 100 * rank for value in everybodys(size)[-1]])


@contract.check(209)
def check_scatter_undoes_gather(subject: Subject) -> None:
    """What a rank gathers and then scatters is back where it was."""

    def body() -> object:
        at_root, output = dist.get_rank() == 0, torch.empty(2)
        collected = [torch.empty(2) for _ in range(dist.get_world_size())] if at_root else None
        dist.gather(mine(), collected)
        dist.scatter(output, collected)
        return output.tolist()

    subject.expect(body, lambda rank, size: everybodys(size)[rank])


@contract.check(210)
def check_all_to_all(subject: Subject) -> None:
    """`all_to_all` gives rank `r` everybody's `r`-th tensor, in rank order."""

    def body() -> object:
        size = dist.get_world_size()
        outputs = [torch.empty(2) for _ in range(size)]
        dist.all_to_all(outputs, [mine() + 100 * receiver for receiver in range(size)])
        return lists(outputs)

    subject.expect(body, lambda rank, size: [[value + 100 * rank for value in row] for row in everybodys(size)])


@contract.check(211, "uneven_all_to_all")
def check_uneven_all_to_all(subject: Subject) -> None:
    """The tensors of an `all_to_all` may differ in size from pair to pair."""

    def body() -> object:
        rank, size = dist.get_rank(), dist.get_world_size()
        outputs = [torch.empty(rank + 2 * sender + 1) for sender in range(size)]
        dist.all_to_all(outputs, [mine(2 * rank + receiver + 1) for receiver in range(size)])
        return lists(outputs)

    subject.expect(
        body,
        lambda rank, size: [everybodys(size, 9)[sender][: rank + 2 * sender + 1] for sender in range(size)],
        least=2,
    )


@contract.check(212)
def check_all_to_all_single(subject: Subject) -> None:
    """`all_to_all_single` without splits cuts dimension 0 into equal parts, one for each rank."""

    def body() -> object:
        size = dist.get_world_size()
        output = torch.empty(2 * size, 2)
        dist.all_to_all_single(output, mine(4 * size).reshape(2 * size, 2))
        return output.reshape(-1).tolist()

    subject.expect(body, lambda rank, size: flat([row[4 * rank : 4 * rank + 4] for row in everybodys(size, 4 * size)]))


@contract.check(213)
def check_all_to_all_single_with_splits(subject: Subject) -> None:
    """`all_to_all_single` with splits sends the sizes that they say, zero included."""

    def body() -> object:
        rank, size = dist.get_rank(), dist.get_world_size()
        sent = [[(sender + 2 * receiver) % 3 for receiver in range(size)] for sender in range(size)]
        received = [row[rank] for row in sent]
        output = torch.empty(sum(received), 2)
        dist.all_to_all_single(output, mine(2 * sum(sent[rank])).reshape(-1, 2), received, sent[rank])
        return output.reshape(-1).tolist()

    def expected(rank: int, size: int) -> object:
        found = []
        for sender, row in enumerate(everybodys(size, 12)):
            before = sum((sender + 2 * receiver) % 3 for receiver in range(rank))
            found += row[2 * before : 2 * (before + (sender + 2 * rank) % 3)]
        return found

    subject.expect(body, expected)


@contract.check(214)
def check_splits_on_one_side(subject: Subject) -> None:
    """Splits given on one side only mean equal parts on the other."""

    def body() -> object:
        size = dist.get_world_size()
        output = torch.empty(size)
        dist.all_to_all_single(output, mine(size), None, [1] * size)
        return output.tolist()

    subject.expect(body, lambda rank, size: [row[rank] for row in everybodys(size, size)])


@contract.check(215)
def check_all_to_all_twice(subject: Subject) -> None:
    """`all_to_all_single` twice brings everything back."""

    def body() -> object:
        size = dist.get_world_size()
        there, back = torch.empty(3 * size), torch.empty(3 * size)
        dist.all_to_all_single(there, mine(3 * size))
        dist.all_to_all_single(back, there)
        return back.tolist()

    subject.expect(body, lambda rank, size: everybodys(size, 3 * size)[rank])


@contract.check(216, "lists_of_ranks")
def check_all_gather_coalesced(subject: Subject) -> None:
    """`all_gather_coalesced` gathers each tensor of a list."""

    def body() -> object:
        outputs = [[torch.empty(2), torch.empty(1)] for _ in range(dist.get_world_size())]
        dist.all_gather_coalesced(outputs, [mine(), mine(1)])
        return [lists(entry) for entry in outputs]

    subject.expect(body, lambda _rank, size: [[row, row[:1]] for row in everybodys(size)])


@contract.check(217)
def check_what_is_received_is_a_copy(subject: Subject) -> None:
    """What a rank received stays when the sender changes its tensor."""

    def body() -> object:
        tensor, outputs = mine(), [torch.empty(2) for _ in range(dist.get_world_size())]
        dist.all_gather(outputs, tensor)
        shared = tensor.clone()
        dist.broadcast(shared, 0)
        tensor.fill_(-1)
        if dist.get_rank() == 0:
            shared.fill_(-2)
        dist.barrier()
        return lists([*outputs, shared])

    subject.expect(body, lambda rank, size: [*everybodys(size), [0.0, 1.0] if rank else [-2.0, -2.0]])


@contract.check(218)
def check_inputs_stay(subject: Subject) -> None:
    """Inputs that are no outputs stay as they were."""

    def body() -> object:
        size = dist.get_world_size()
        tensor = mine(size)
        dist.all_gather([torch.empty(size) for _ in range(size)], tensor)
        all_gather_single(torch.empty(size * size), tensor)
        reduce_scatter_single(torch.empty(1), tensor)
        dist.all_to_all_single(torch.empty(size), tensor)
        dist.gather(tensor, [torch.empty(size) for _ in range(size)] if dist.get_rank() == 0 else None)
        return tensor.tolist()

    subject.expect(body, lambda rank, size: everybodys(size, size)[rank])


@contract.check(219)
def check_the_input_may_be_part_of_the_output(subject: Subject) -> None:
    """The input of `all_gather_into_tensor` may be this rank's part of the output."""

    def body() -> object:
        rank, size = dist.get_rank(), dist.get_world_size()
        output = torch.zeros(2 * size)
        part = output[2 * rank : 2 * rank + 2]
        part.copy_(mine())
        all_gather_single(output, part)
        return output.tolist()

    subject.expect(body, lambda _rank, size: flat(everybodys(size)))


@contract.check(220)
def check_only_the_view_is_written_to(subject: Subject) -> None:
    """An output that is part of a larger tensor is written to, and nothing around it."""

    def body() -> object:
        size = dist.get_world_size()
        buffer = torch.full((size + 2,), -1.0)
        all_gather_single(buffer[1:-1], mine(1))
        return buffer.tolist()

    subject.expect(body, lambda _rank, size: [-1.0, *flat(everybodys(size, 1)), -1.0])


@contract.check(221, "strided_lists")
def check_strided_lists(subject: Subject) -> None:
    """`all_gather` and `all_to_all` get tensors right that are not contiguous."""

    def body() -> object:
        size = dist.get_world_size()
        gathered, exchanged = torch.zeros(size, 4), torch.zeros(size, 4)
        dist.all_gather([row[::2] for row in gathered], mine(4)[::2])
        dist.all_to_all([row[::2] for row in exchanged], [mine(4)[::2] + 100 * receiver for receiver in range(size)])
        return gathered.tolist(), exchanged.tolist()

    subject.expect(
        body,
        lambda rank, size: (
            [[row[0], 0.0, row[2], 0.0] for row in everybodys(size, 4)],
            [[row[0] + 100 * rank, 0.0, row[2] + 100 * rank, 0.0] for row in everybodys(size, 4)],
        ),
    )


@contract.check(222)
def check_nothing_travels(subject: Subject) -> None:
    """Tensors of no elements are taken by every collective."""

    def body() -> object:
        size = dist.get_world_size()
        tensor, outputs = torch.empty(0), [torch.empty(0, 3) for _ in range(size)]
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 0)
        dist.all_gather(outputs, torch.empty(0, 3))
        all_gather_single(torch.empty(0), tensor)
        reduce_scatter_single(torch.empty(0), tensor)
        dist.reduce_scatter(torch.empty(0, 3), outputs)
        dist.all_to_all(outputs, [torch.empty(0, 3) for _ in range(size)])
        dist.all_to_all_single(torch.empty(0), tensor)
        after = torch.ones(1)
        dist.all_reduce(after)
        return after.item()

    subject.expect(body, lambda _rank, size: 1.0 * size)


@contract.check(223)
def check_scalars_travel(subject: Subject) -> None:
    """Tensors without dimensions are taken where nothing is split."""

    def body() -> object:
        size = dist.get_world_size()
        tensor, outputs = torch.tensor(1.0 + dist.get_rank()), [torch.tensor(0.0) for _ in range(size)]
        dist.all_gather(outputs, tensor)
        dist.broadcast(tensor, last_rank())
        return lists(outputs), tensor.item()

    subject.expect(body, lambda _rank, size: ([1.0 + rank for rank in range(size)], 1.0 * size))
