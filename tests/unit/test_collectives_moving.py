"""Collectives that move data, alone and several at once."""

import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from collective_values import MOVES, NUMBERS, values
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_ranks import all_gather_single, on_ranks, reduce_scatter_single
from torch.distributed import distributed_c10d as c10d

from lightrft.errors import RankFailedError

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]


COMPLEX = [torch.complex64, torch.complex128]


SHAPES = [(), (0,), (1,), (3,), (2, 3), (4, 0, 2)]


# -- moving data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
@pytest.mark.parametrize(
    ("backend", "dtypes"),
    [("gloo", [*NUMBERS, torch.bool, *COMPLEX]), ("nccl", [*NUMBERS, torch.bool, *FP8])],
    ids=["gloo", "nccl"],
)
def test_an_operation_moves_every_dtype_and_shape(move, backend, dtypes):
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        for dtype in dtypes:
            for shape in SHAPES:
                move(rank, size, functools.partial(values, shape=shape, dtype=dtype))

    on_ranks(3, body, backend=backend)


def test_lists_may_be_uneven_where_the_backend_allows_it():
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        outputs = [torch.empty(owner) for owner in range(size)]
        dist.all_gather(outputs, torch.full((rank,), float(rank)))
        output = torch.empty(rank)
        dist.reduce_scatter(output, [torch.full((owner,), float(rank)) for owner in range(size)])
        received = [torch.empty(sender) for sender in range(size)]
        dist.all_to_all(received, [torch.full((rank,), float(receiver)) for receiver in range(size)])
        return [t.tolist() for t in outputs], output.tolist(), [t.tolist() for t in received]

    for rank, (gathered, scattered, received) in enumerate(on_ranks(4, body, backend="nccl")):
        assert gathered == [[], [1.0], [2.0, 2.0], [3.0, 3.0, 3.0]]
        assert scattered == [6.0] * rank
        assert received == [[float(rank)] * sender for sender in range(4)]


@given(st.data())
@settings(max_examples=20, deadline=None)
def test_all_to_all_single_sends_what_the_splits_say(data):
    size = data.draw(st.integers(1, 4))
    splits = [[data.draw(st.integers(0, 3)) for _ in range(size)] for _ in range(size)]

    def body():
        rank = dist.get_rank()
        rows = [torch.full((count, 2), 10.0 * rank + to) for to, count in enumerate(splits[rank])]
        receive = [splits[sender][rank] for sender in range(size)]
        output = torch.empty(sum(receive), 2)
        dist.all_to_all_single(output, torch.cat(rows), receive, splits[rank])
        return output[:, 0].tolist()

    for rank, received in enumerate(on_ranks(size, body)):
        assert received == [10.0 * sender + rank for sender in range(size) for _ in range(splits[sender][rank])]


def test_a_root_is_a_global_rank_unless_it_is_said_to_be_a_rank_of_the_group():
    def body():
        rank = dist.get_rank()
        group = dist.new_group([1, 3])
        if rank not in (1, 3):
            return None
        one, other, total = (torch.tensor([float(rank)]) for _ in range(3))
        dist.broadcast(one, 3, group=group)
        dist.broadcast(other, group=group, group_src=0)
        dist.reduce(total, 3, group=group)
        parts = [torch.tensor([5.0]), torch.tensor([6.0])] if rank == 1 else None
        mine = torch.empty(1)
        dist.scatter(mine, parts, src=1, group=group)
        return one.item(), other.item(), total.item(), mine.item()

    results = on_ranks(4, body)
    assert results[3] == (3.0, 1.0, 4.0, 6.0)
    assert results[1][:2] == (3.0, 1.0)
    assert results[1][3] == 5.0


# -- several at once ---------------------------------------------------------------------------------------------------


def test_coalesced_calls_do_what_the_single_ones_do():
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        group = c10d._get_default_group()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            reduced = [torch.tensor([1.0]), torch.full((2, 2), float(rank))]
            dist.all_reduce_coalesced(reduced)
            future = [torch.ones(2)]
            assert dist.all_reduce_coalesced(future, async_op=True).wait()[0].tolist() == [size, size]
            gathered = [[torch.empty(1), torch.empty(2)] for _ in range(size)]
            dist.all_gather_coalesced(gathered, [torch.tensor([float(rank)]), torch.tensor([rank + 10.0, 0.0])])
        singles = [torch.empty(size), torch.empty(2 * size)]
        group.all_gather_single_coalesced(
            singles, [torch.tensor([rank + 0.5]), torch.tensor([rank, -rank]).float()]
        ).wait()
        parts = [torch.empty(1), torch.empty(2)]
        group.reduce_scatter_single_coalesced(parts, [torch.arange(3.0), torch.arange(6.0)]).wait()
        return [[t.tolist() for t in entry] for entry in (reduced, *gathered, singles, parts)]

    for rank, result in enumerate(on_ranks(3, body)):
        assert result[0] == [[3.0], [[3.0, 3.0], [3.0, 3.0]]]
        assert result[1:4] == [[[owner], [owner + 10.0, 0.0]] for owner in range(3)]
        assert result[4] == [[0.5, 1.5, 2.5], [0.0, 0.0, 1.0, -1.0, 2.0, -2.0]]
        assert result[5] == [[3.0 * rank], [6.0 * rank, 6.0 * rank + 3]]


@pytest.mark.parametrize("device", [None, "cpu"])
@pytest.mark.parametrize("async_ops", [False, True])
def test_the_coalescing_manager_batches_collectives(device, async_ops):
    device = device and torch.device(device)

    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        sums = [torch.tensor([float(rank)]), torch.ones(2)]
        with dist._coalescing_manager(device=device, async_ops=async_ops) as manager:
            for tensor in sums:
                dist.all_reduce(tensor)
        if async_ops:
            manager.wait()
        outputs = [torch.empty(size), torch.empty(2 * size)]
        with dist._coalescing_manager(device=device, async_ops=async_ops) as manager:
            all_gather_single(outputs[0], torch.tensor([float(rank)]))
            all_gather_single(outputs[1], torch.tensor([1.0, float(rank)]))
        if async_ops:
            manager.wait()
        parts = [torch.empty(1), torch.empty(1)]
        with dist._coalescing_manager(device=device, async_ops=async_ops) as manager:
            for part in parts:
                reduce_scatter_single(part, torch.arange(float(size)))
        if async_ops:
            manager.wait()
        return [t.tolist() for t in (*sums, *outputs, *parts)]

    for rank, result in enumerate(on_ranks(2, body, backend="nccl" if device else "gloo")):
        assert result == [[1.0], [2.0, 2.0], [0.0, 1.0], [1.0, 0.0, 1.0, 1.0], [2.0 * rank], [2.0 * rank]]


def test_inside_the_coalescing_manager_of_nccl_nothing_blocks():
    def body():
        rank, other = dist.get_rank(), 1 - dist.get_rank()
        received, shared = torch.empty(1), torch.tensor([float(rank)])
        with dist._coalescing_manager(device=torch.device("cpu")):
            dist.send(torch.tensor([float(rank)]), other)  # both send first: alone, that is a deadlock
            dist.recv(received, other)
            dist.broadcast(shared, 1)
        return received.item(), shared.item()

    assert on_ranks(2, body, backend="nccl") == [(1.0, 1.0), (0.0, 1.0)]


def test_collectives_lost_by_a_coalescing_manager_that_failed_are_an_error():
    def body():
        with pytest.raises(ZeroDivisionError), dist._coalescing_manager():
            dist.get_rank() // 0
        dist.all_reduce(torch.ones(1))  # torch only records it, silently

    with pytest.raises(RankFailedError, match="1 collectives were only recorded, and never ran"):
        on_ranks(2, body)
