"""PG101 and on: reductions."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import (
    Subject,
    all_gather_single,
    everybodys,
    last_rank,
    lists,
    mine,
    reduce_scatter_single,
    total,
)

BITS = (0b1100, 0b1010, 0b0110)


@contract.check(101)
def check_all_reduce_sum(subject: Subject) -> None:
    """`all_reduce` with SUM leaves the sum of all ranks' tensors on every rank."""

    def body() -> object:
        tensor = mine()
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor.tolist()

    subject.expect(body, lambda _rank, size: total(size))


@contract.check(102)
def check_all_reduce_sums_by_default(subject: Subject) -> None:
    """The reduction of `all_reduce` is SUM unless another one is asked for."""

    def body() -> object:
        tensor = mine()
        dist.all_reduce(tensor)
        return tensor.tolist()

    subject.expect(body, lambda _rank, size: total(size))


@contract.check(103)
def check_all_reduce_avg(subject: Subject) -> None:
    """AVG is the sum divided by the size of the group."""

    def body() -> object:
        tensor = mine()
        dist.all_reduce(tensor, dist.ReduceOp.AVG)
        return tensor.tolist()

    subject.expect(body, lambda _rank, size: [value / size for value in total(size)])


@contract.check(104)
def check_all_reduce_product(subject: Subject) -> None:
    """PRODUCT multiplies."""

    def body() -> object:
        tensor = mine() + 2
        dist.all_reduce(tensor, dist.ReduceOp.PRODUCT)
        return tensor.tolist()

    subject.expect(
        body,
        lambda _rank, size: [
            math.prod(value + 2 for value in column) for column in zip(*everybodys(size), strict=True)
        ],
    )


@contract.check(105)
def check_all_reduce_min(subject: Subject) -> None:
    """MIN finds the smallest value of each position."""

    def body() -> object:
        tensor = mine() * torch.tensor([1.0, -1.0])
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor.tolist()

    subject.expect(body, lambda _rank, size: [0.0, -10.0 * (size - 1) - 1])


@contract.check(106)
def check_all_reduce_max(subject: Subject) -> None:
    """MAX finds the largest value of each position."""

    def body() -> object:
        tensor = mine() * torch.tensor([1.0, -1.0])
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.tolist()

    subject.expect(body, lambda _rank, size: [10.0 * (size - 1), -1.0])


@contract.check(107, "bitwise")
def check_all_reduce_band(subject: Subject) -> None:
    """BAND keeps the bits that all ranks have."""

    def body() -> object:
        tensor = torch.tensor([BITS[dist.get_rank()]])
        dist.all_reduce(tensor, dist.ReduceOp.BAND)
        return tensor.item()

    subject.expect(body, lambda _rank, size: BITS[0] & (BITS[1] if size > 1 else -1) & (BITS[2] if size > 2 else -1))


@contract.check(108, "bitwise")
def check_all_reduce_bor(subject: Subject) -> None:
    """BOR keeps the bits that any rank has."""

    def body() -> object:
        tensor = torch.tensor([BITS[dist.get_rank()]])
        dist.all_reduce(tensor, dist.ReduceOp.BOR)
        return tensor.item()

    subject.expect(body, lambda _rank, size: BITS[0] | (BITS[1] if size > 1 else 0) | (BITS[2] if size > 2 else 0))


@contract.check(109, "bitwise")
def check_all_reduce_bxor(subject: Subject) -> None:
    """BXOR keeps the bits that an odd number of ranks has."""

    def body() -> object:
        tensor = torch.tensor([BITS[dist.get_rank()]])
        dist.all_reduce(tensor, dist.ReduceOp.BXOR)
        return tensor.item()

    subject.expect(body, lambda _rank, size: BITS[0] ^ (BITS[1] if size > 1 else 0) ^ (BITS[2] if size > 2 else 0))


@contract.check(110, "premul_sum")
def check_all_reduce_premul_sum(subject: Subject) -> None:
    """PREMUL_SUM multiplies by its factor, then adds."""

    def body() -> object:
        tensor = mine()
        dist.all_reduce(tensor, dist._make_nccl_premul_sum(0.5))  # type: ignore[attr-defined]
        return tensor.tolist()

    subject.expect(body, lambda _rank, size: [value / 2 for value in total(size)])


@contract.check(111, "integer_average")
def check_all_reduce_averages_integers(subject: Subject) -> None:
    """AVG of integers is the sum divided, without the rest."""

    def body() -> object:
        tensor = mine(dtype=torch.int64) + 1
        dist.all_reduce(tensor, dist.ReduceOp.AVG)
        return tensor.tolist()

    subject.expect(body, lambda _rank, size: [int((value + size) / size) for value in total(size)])


@contract.check(112)
def check_integers_wrap_around(subject: Subject) -> None:
    """Sums of integers wrap around."""

    def body() -> object:
        tensor = torch.tensor([100], dtype=torch.int8)
        dist.all_reduce(tensor)
        return tensor.item()

    subject.expect(body, lambda _rank, size: (100 * size + 128) % 256 - 128)


@contract.check(113)
def check_nan_spreads(subject: Subject) -> None:
    """A NaN of one rank is in the sum of all, at its position alone."""

    def body() -> object:
        tensor = torch.ones(2)
        if dist.get_rank() == last_rank():
            tensor[1] = math.nan
        dist.all_reduce(tensor)
        return tensor.isnan().tolist()

    subject.expect(body, lambda _rank, _size: [False, True])


@contract.check(114)
def check_all_reduce_keeps_shapes(subject: Subject) -> None:
    """`all_reduce` takes tensors of any number of dimensions, none included."""

    def body() -> object:
        tensors = [torch.tensor(1.0), torch.ones(1, 2, 1), torch.ones(2, 2, 2, 2)]
        for tensor in tensors:
            dist.all_reduce(tensor)
        return lists(tensors)

    subject.expect(
        body, lambda _rank, n: [1.0 * n, [[[1.0 * n]] * 2], (torch.ones(2, 2, 2, 2, device="cpu") * n).tolist()]
    )


@contract.check(115)
def check_ranks_agree_to_the_last_bit(subject: Subject) -> None:
    """All ranks hold the same bits after an `all_reduce`, whatever the order of adding."""

    def body() -> object:
        tensor = torch.sin(torch.arange(100.0) + 100 * dist.get_rank())
        dist.all_reduce(tensor)
        return tensor.tolist()

    found = subject.run(body)
    assert all(values == found[0] for values in found), found


@contract.check(116, "any_shape")
def check_shapes_may_differ(subject: Subject) -> None:
    """`all_reduce` and `broadcast` look at the number of elements, not at the shape."""

    def body() -> object:
        tensor = torch.ones(4) if dist.get_rank() else torch.ones(2, 2)
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 0)
        return tensor.reshape(-1).tolist()

    subject.expect(body, lambda _rank, size: [1.0 * size] * 4, least=2)


@contract.check(117)
def check_reduce(subject: Subject) -> None:
    """`reduce` leaves the sum on its root, for every root."""

    def body() -> object:
        found = []
        for root in range(dist.get_world_size()):
            tensor = mine() + root
            dist.reduce(tensor, root)
            if dist.get_rank() == root:
                found.append(tensor.tolist())
        return found

    subject.expect(body, lambda rank, size: [[value + rank * size for value in total(size)]])


@contract.check(118)
def check_reduce_max(subject: Subject) -> None:
    """`reduce` knows other reductions than SUM."""

    def body() -> object:
        tensor = mine()
        dist.reduce(tensor, last_rank(), dist.ReduceOp.MAX)
        return tensor.tolist() if dist.get_rank() == last_rank() else None

    subject.expect(body, lambda rank, size: [10.0 * rank, 10.0 * rank + 1] if rank == size - 1 else None)


@contract.check(119, "reduce_keeps_inputs")
def check_reduce_keeps_inputs(subject: Subject) -> None:
    """`reduce` leaves the tensors of all but the root as they were."""

    def body() -> object:
        tensor = mine()
        dist.reduce(tensor, 0)
        return dist.get_rank() == 0 or tensor.equal(mine())

    subject.expect(body, lambda _rank, _size: True, least=2)


@contract.check(120)
def check_reduce_scatter(subject: Subject) -> None:
    """`reduce_scatter` gives rank `r` the reduction of everybody's `r`-th tensor."""

    def body() -> object:
        outputs = []
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
            output = torch.empty(2)
            dist.reduce_scatter(output, [mine() + 100 * owner for owner in range(dist.get_world_size())], op)
            outputs.append(output.tolist())
        return outputs

    subject.expect(
        body,
        lambda rank, size: [
            [value + 100 * rank * size for value in total(size)],
            [value + 100 * rank for value in everybodys(size)[-1]],
        ],
    )


@contract.check(121)
def check_uneven_reduce_scatter(subject: Subject) -> None:
    """The tensors of a `reduce_scatter` may differ in size from receiver to receiver."""

    def body() -> object:
        output = torch.empty(dist.get_rank() + 1)
        dist.reduce_scatter(output, [mine(owner + 1) for owner in range(dist.get_world_size())])
        return output.tolist()

    subject.expect(body, lambda rank, size: total(size, rank + 1))


@contract.check(122)
def check_reduce_scatter_single(subject: Subject) -> None:
    """`reduce_scatter_tensor` gives rank `r` the `r`-th equal part of the reduction, along dimension 0."""

    def body() -> object:
        size, outputs = dist.get_world_size(), []
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            output = torch.empty(1, 2)
            reduce_scatter_single(output, mine(2 * size).reshape(size, 2), op)
            outputs.append(output[0].tolist())
        return outputs

    def expected(rank: int, size: int) -> object:
        part = total(size, 2 * size)[2 * rank : 2 * rank + 2]
        return [part, [value / size for value in part]]

    subject.expect(body, expected)


@contract.check(123)
def check_reduce_scatter_and_all_gather_are_all_reduce(subject: Subject) -> None:
    """`reduce_scatter_tensor` and then `all_gather_into_tensor` come to what `all_reduce` comes to."""

    def body() -> object:
        size = dist.get_world_size()
        whole, part, gathered = mine(4 * size), torch.empty(4), torch.empty(4 * size)
        reduce_scatter_single(part, whole)
        all_gather_single(gathered, part)
        dist.all_reduce(whole)
        return gathered.equal(whole)

    subject.expect(body, lambda _rank, _size: True)


@contract.check(124)
def check_all_reduce_coalesced(subject: Subject) -> None:
    """`all_reduce_coalesced` reduces each tensor of a list."""

    def body() -> object:
        tensors = [mine(), mine(3), mine(1)]
        dist.all_reduce_coalesced(tensors)
        return lists(tensors)

    subject.expect(body, lambda _rank, size: [total(size), total(size, 3), total(size, 1)])


@contract.check(125)
def check_only_the_view_is_reduced(subject: Subject) -> None:
    """A tensor that is part of a larger one is reduced, and nothing around it."""

    def body() -> object:
        buffer = torch.ones(4, 2)
        dist.all_reduce(buffer[1:3])
        return buffer.tolist()

    subject.expect(body, lambda _rank, size: [[1.0, 1.0], [1.0 * size] * 2, [1.0 * size] * 2, [1.0, 1.0]])


@contract.check(126)
def check_channels_last(subject: Subject) -> None:
    """`all_reduce` and `broadcast` get tensors in `channels_last` layout right, if all ranks have that layout."""

    def body() -> object:
        start = torch.arange(48.0).reshape(2, 3, 2, 4) + dist.get_rank()
        tensor = start.to(memory_format=torch.channels_last)
        dist.all_reduce(tensor)
        reduced = tensor.tolist()
        tensor = start.to(memory_format=torch.channels_last)
        dist.broadcast(tensor, last_rank())
        return reduced, tensor.tolist()

    def expected(_rank: int, size: int) -> object:
        start = torch.arange(48.0).reshape(2, 3, 2, 4)
        return (start * size + sum(range(size))).tolist(), (start + size - 1).tolist()

    subject.expect(body, expected)
