"""What every collective computes, for every dtype and shape, and what it leaves alone."""

import functools
import inspect
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightrft.errors import RankFailedError
from lightrft.sim import SimWorld

DOCS = Path(__file__).parents[2] / "docs" / "process-group.md"

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NUMBERS = [*FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
COMPLEX = [torch.complex64, torch.complex128]
SHAPES = [(), (0,), (1,), (3,), (2, 3), (4, 0, 2)]

# torch 2.13 renamed them; torch 2.11 and 2.12 know the old names only
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def on_ranks(size, body, *, backend="gloo", **options):
    """Run ``body()`` on ``size`` ranks that have a group; what it returns, by rank."""

    def main():
        dist.init_process_group(backend)
        result = body()
        dist.destroy_process_group()
        return result

    return SimWorld(size, **options).run(main)


def values(owner, shape, dtype):
    """Small values that tell owners and positions apart."""
    count = torch.Size(shape).numel()
    numbers = (torch.arange(count) * 3 + owner * 2) % 7
    if dtype == torch.bool:
        return (numbers % 2 == 0).reshape(shape)
    if dtype.is_complex:
        return torch.complex(numbers.double(), (numbers + owner).double()).to(dtype).reshape(shape)
    return numbers.float().to(dtype).reshape(shape)


def same(left, right):
    """The same dtype, shape and bits."""
    bits = [t.detach().reshape(-1).view(torch.uint8) for t in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*bits)


# -- moving data ------------------------------------------------------------------------------------------------------


def broadcast(rank, size, make):
    for root in range(size):
        tensor = make(rank)
        dist.broadcast(tensor, root)
        assert same(tensor, make(root))


def all_gather(rank, size, make):
    outputs = [make(size) for _ in range(size)]
    dist.all_gather(outputs, make(rank))
    assert all(same(output, make(owner)) for owner, output in enumerate(outputs))


def all_gather_into_one(rank, size, make):
    mine = make(rank)
    if mine.dim():
        output = torch.cat([make(size)] * size)
        all_gather_single(output, mine)
        assert same(output, torch.cat([make(owner) for owner in range(size)]))


def gather(rank, size, make):
    if make(0).is_complex():
        return  # neither gloo nor nccl gathers complex numbers
    for root in range(size):
        outputs = [make(size) for _ in range(size)] if rank == root else None
        dist.gather(make(rank), outputs, dst=root)
        assert rank != root or all(same(output, make(owner)) for owner, output in enumerate(outputs))


def scatter(rank, size, make):
    for root in range(size):
        output = make(size)
        dist.scatter(output, [make(root + 10 * owner) for owner in range(size)] if rank == root else None, src=root)
        assert same(output, make(root + 10 * rank))


def all_to_all(rank, size, make):
    outputs = [make(size) for _ in range(size)]
    dist.all_to_all(outputs, [make(10 * rank + receiver) for receiver in range(size)])
    assert all(same(output, make(10 * sender + rank)) for sender, output in enumerate(outputs))


def all_to_all_in_one(rank, size, make):
    if make(0).dim():
        output = torch.cat([make(size)] * size)
        dist.all_to_all_single(output, torch.cat([make(10 * rank + receiver) for receiver in range(size)]))
        assert same(output, torch.cat([make(10 * sender + rank) for sender in range(size)]))


def send_and_receive(rank, size, make):
    tensor = make(size)
    sending = dist.isend(make(rank), (rank + 1) % size)
    assert dist.recv(tensor, (rank - 1) % size) == (rank - 1) % size
    sending.wait()
    assert same(tensor, make((rank - 1) % size))


MOVES = [broadcast, all_gather, all_gather_into_one, gather, scatter, all_to_all, all_to_all_in_one, send_and_receive]


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


# -- reducing ---------------------------------------------------------------------------------------------------------

REDUCTIONS = {
    "SUM": lambda stack: stack.sum(0),
    "PRODUCT": lambda stack: stack.prod(0),
    "MIN": lambda stack: stack.amin(0),
    "MAX": lambda stack: stack.amax(0),
    "AVG": lambda stack: stack.sum(0) / len(stack),
}
BITWISE = {
    "BAND": lambda stack: stack[0] & stack[1] & stack[2],
    "BOR": lambda stack: stack[0] | stack[1] | stack[2],
    "BXOR": lambda stack: stack[0] ^ stack[1] ^ stack[2],
}


def expected(name, size, shape, dtype):
    """What one process makes of the values of all; exact in every dtype, as they are small whole numbers."""
    stack = torch.stack([values(owner, shape, dtype) for owner in range(size)])
    if name in BITWISE:
        return BITWISE[name](stack)
    return REDUCTIONS[name](stack.to(torch.int64 if dtype == torch.bool else torch.float64)).to(dtype)


def check_reductions(rank, size, names, dtype):
    for name in names:
        op, total = getattr(dist.ReduceOp, name), expected(name, size, (6,), dtype)
        tensor = values(rank, (6,), dtype)
        dist.all_reduce(tensor, op)
        assert same(tensor, total), (name, dtype)
        for root in range(size):
            tensor = values(rank, (6,), dtype)
            dist.reduce(tensor, root, op)
            assert rank != root or same(tensor, total), (name, dtype)
        part = torch.empty(2, dtype=dtype)
        dist.reduce_scatter(part, list(values(rank, (6,), dtype).chunk(size)), op)
        assert same(part, total.chunk(size)[rank]), (name, dtype)
        part = torch.empty(2, dtype=dtype)
        reduce_scatter_single(part, values(rank, (6,), dtype), op)
        assert same(part, total.chunk(size)[rank]), (name, dtype)


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_every_reduction_is_right_for_every_dtype_that_has_it(backend):
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        for dtype in NUMBERS:
            average = [] if not dtype.is_floating_point else ["AVG"]
            check_reductions(rank, size, ["SUM", "PRODUCT", "MIN", "MAX", *average], dtype)
        check_reductions(rank, size, ["SUM", "PRODUCT", "MIN", "MAX"], torch.bool)
        if backend == "gloo":
            for dtype in [torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool]:
                check_reductions(rank, size, ["BAND", "BOR", "BXOR"], dtype)

    on_ranks(3, body, backend=backend)


def test_complex_numbers_are_added_and_averaged():
    def body():
        rank = dist.get_rank()
        tensor, total = torch.tensor([rank + 1j]), torch.tensor([rank + 1j])
        dist.all_reduce(tensor)
        dist.all_reduce(total, dist.ReduceOp.AVG)
        part = torch.empty(1, dtype=torch.complex64)
        reduce_scatter_single(part, torch.tensor([1j, rank + 0j, 2 + 0j]))
        return tensor.item(), total.item(), part.item()

    assert on_ranks(3, body) == [(3 + 3j, 1 + 1j, 3j), (3 + 3j, 1 + 1j, 3 + 0j), (3 + 3j, 1 + 1j, 6 + 0j)]


def test_premul_sum_multiplies_first():
    def body():
        tensor = torch.tensor([1.0, 2.0]) * (dist.get_rank() + 1)
        dist.all_reduce(tensor, dist._make_nccl_premul_sum(0.5))
        part = torch.empty(1, dtype=torch.bfloat16)
        reduce_scatter_single(part, torch.ones(2, dtype=torch.bfloat16), dist._make_nccl_premul_sum(torch.tensor(0.25)))
        return tensor.tolist(), part.item()

    assert on_ranks(2, body, backend="nccl") == [([1.5, 3.0], 0.5)] * 2


def test_a_tensor_of_many_blocks_is_reduced_as_a_small_one():
    def body():
        generator = torch.Generator().manual_seed(dist.get_rank())
        tensor = torch.randn(3, 70_001, generator=generator)
        dist.all_reduce(tensor)
        return tensor

    parts = [torch.randn(3, 70_001, generator=torch.Generator().manual_seed(rank)) for rank in range(3)]
    assert all(torch.equal(result, parts[0] + parts[1] + parts[2]) for result in on_ranks(3, body))


def test_reduce_leaves_nothing_useful_on_the_other_ranks_as_gloo_does():
    def body():
        results = []
        for async_op in (False, True):
            tensor = torch.tensor([dist.get_rank() + 1.0])
            work = dist.reduce(tensor, 0, async_op=async_op)
            if async_op:
                work.wait()
            results.append(tensor)
        return torch.cat(results)

    strict, nccl = on_ranks(2, body), on_ranks(2, body, profile="nccl")
    assert strict[0].tolist() == nccl[0].tolist() == [3.0, 3.0]
    assert strict[1].isnan().all()
    assert nccl[1].tolist() == [2.0, 2.0]


# -- several at once --------------------------------------------------------------------------------------------------


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


# -- what is left alone -----------------------------------------------------------------------------------------------


def test_parameters_are_written_to_without_autograd_noticing():
    def body():
        rank = dist.get_rank()
        parameter = torch.nn.Parameter(torch.full((2,), float(rank)))
        version = parameter._version
        dist.broadcast(parameter, 1)
        dist.all_reduce(parameter)
        dist.all_reduce(parameter, async_op=True).wait()
        dist.reduce(parameter, 0)
        dist.scatter(parameter, [torch.ones(2)] * 2 if rank == 0 else None)
        dist.all_to_all_single(parameter, torch.ones(2))
        if rank:
            dist.recv(parameter, 0)
        else:
            dist.send(parameter, 1)
        assert parameter.is_leaf
        assert parameter.requires_grad
        return parameter._version - version

    assert on_ranks(2, body) == [0, 0]


def test_a_result_in_the_graph_is_seen_by_the_backward_pass_as_data():
    def body():
        weight = torch.full((2,), 2.0, requires_grad=True)
        loss = weight * 3
        dist.all_reduce(loss)
        loss.sum().backward()
        return loss.tolist(), weight.grad.tolist()

    assert on_ranks(2, body) == [([12.0, 12.0], [3.0, 3.0])] * 2


def test_version_counters_advance_where_gloo_copies_its_results():
    def body():
        size = dist.get_world_size()
        outputs, single, part = [torch.zeros(2) for _ in range(size)], torch.zeros(2 * size), torch.zeros(2)
        dist.all_gather(outputs, torch.ones(2))
        all_gather_single(single, torch.ones(2))
        reduce_scatter_single(part, torch.ones(2 * size))
        return [t._version > 0 for t in (*outputs, single, part)]

    assert on_ranks(2, body) == [[True] * 4] * 2


def test_ranks_may_differ_in_inference_mode():
    def body():
        size = dist.get_world_size()
        with torch.inference_mode(dist.get_rank() == 1):
            total, gathered, part = torch.ones(2), torch.empty(2 * size), torch.empty(1)
            dist.all_reduce(total)
            all_gather_single(gathered, total)
            reduce_scatter_single(part, torch.ones(size), async_op=True).wait()
        return total.tolist(), gathered.tolist(), part.tolist(), total.is_inference()

    results = on_ranks(3, body)
    assert all(result[:3] == ([3.0, 3.0], [3.0] * 6, [3.0]) for result in results)
    assert [result[3] for result in results] == [False, True, False]


def test_a_tensor_made_in_inference_mode_is_reduced_outside_of_it():
    def body():
        with torch.inference_mode():
            tensor, other = torch.ones(2), torch.ones(2)
        dist.all_reduce(tensor)
        dist.broadcast(other, 0, async_op=True).wait()
        return tensor.tolist()

    assert on_ranks(2, body) == [[2.0, 2.0]] * 2


def test_gloo_does_not_copy_into_a_tensor_of_inference_mode_outside_of_it():
    def body():
        with torch.inference_mode():
            outputs = [torch.empty(1) for _ in range(dist.get_world_size())]
        dist.all_gather(outputs, torch.ones(1))

    with pytest.raises(RankFailedError, match="Inplace update to inference tensor outside InferenceMode"):
        on_ranks(2, body)


def test_the_results_are_the_same_whatever_dispatch_mode_a_rank_is_in():
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.operations = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.operations.append(str(func))
            return func(*args, **(kwargs or {}))

    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        total, gathered, received = torch.ones(2), torch.zeros(2 * size), torch.zeros(1)
        inputs = torch.ones(2), torch.ones(1)
        with Seen() as mode, FlopCounterMode(display=False):
            dist.all_reduce(total)
            all_gather_single(gathered, inputs[0], async_op=True).wait()
            sending = dist.isend(inputs[1], (rank + 1) % size)
            dist.recv(received, (rank - 1) % size)
            sending.wait()
        return total.tolist(), gathered.tolist(), received.tolist(), mode.operations

    assert on_ranks(3, body) == [([3.0, 3.0], [1.0] * 6, [1.0], [])] * 3


def test_only_the_part_of_a_buffer_that_was_given_is_written_to():
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        buffer = torch.full((10,), -1.0)
        buffer[2:4] = rank
        dist.all_reduce(buffer[2:4])
        all_gather_single(buffer[4 : 4 + size], torch.tensor([float(rank)]))
        dist.broadcast(buffer[9:], 0, async_op=True).wait()
        return buffer.tolist()

    assert on_ranks(3, body) == [[-1.0, -1.0, 3.0, 3.0, 0.0, 1.0, 2.0, -1.0, -1.0, -1.0]] * 3


@pytest.mark.parametrize("async_op", [False, True])
def test_an_input_may_be_a_view_of_the_output_as_in_fsdp(async_op):
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        gathered = torch.zeros(2 * size)
        gathered.chunk(size)[rank].fill_(rank)
        reduced = torch.arange(2.0 * size)
        listed = torch.zeros(size, 2)
        listed[rank] = rank
        works = [
            all_gather_single(gathered, gathered.chunk(size)[rank], async_op=async_op),
            reduce_scatter_single(reduced.chunk(size)[rank], reduced, async_op=async_op),
            dist.all_gather(list(listed), listed[rank], async_op=async_op),
        ]
        if async_op:
            for work in works:
                work.wait()
        return gathered.tolist(), reduced.chunk(size)[rank].tolist(), listed.tolist()

    for rank, (gathered, reduced, listed) in enumerate(on_ranks(3, body)):
        assert gathered == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
        assert reduced == [6.0 * rank, 6.0 * rank + 3]
        assert listed == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_channels_last_tensors_are_reduced_in_place():
    def body():
        plain = torch.arange(48.0).reshape(2, 3, 2, 4) * (dist.get_rank() + 1)
        tensor = plain.to(memory_format=torch.channels_last)
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 0)
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        return torch.equal(tensor, torch.arange(48.0).reshape(2, 3, 2, 4) * 3)

    assert on_ranks(2, body) == [True, True]


def test_what_a_rank_receives_is_its_own():
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        outputs = [torch.empty(1) for _ in range(size)]
        mine = torch.tensor([float(rank)])
        dist.all_gather(outputs, mine)
        for output in outputs:
            output.add_(100 * rank)
        mine.fill_(-1)
        dist.barrier()
        return [output.item() for output in outputs]

    assert on_ranks(3, body) == [[100.0 * rank + owner for owner in range(3)] for rank in range(3)]


# -- barriers ---------------------------------------------------------------------------------------------------------


def test_nobody_leaves_a_barrier_before_everybody_has_come():
    come, left = [], []

    def body():
        come.append(dist.get_rank())
        dist.barrier()
        left.append(len(come))
        dist.barrier(async_op=True).wait()
        dist.barrier(device_ids=[0])
        dist.barrier(timeout=timedelta(seconds=1))

    on_ranks(5, body, schedule="random", seed=3)
    assert left == [5] * 5


def test_a_barrier_with_a_timeout_of_its_own_names_who_did_not_come():
    def body():
        if dist.get_rank() != 2:
            dist.barrier(timeout=timedelta(seconds=2))

    with pytest.raises(RankFailedError, match=r"barrier\(\) .* waited 2000 ms .* did not come, or have given up: 2"):
        on_ranks(3, body)


@pytest.mark.parametrize(("wait_all", "named"), [(False, "Rank 1"), (True, "Ranks 1, 3")])
def test_the_monitored_barrier_names_who_did_not_come(wait_all, named):
    def body():
        if dist.get_rank() in (1, 3):
            return "absent"
        try:
            dist.monitored_barrier(timeout=timedelta(seconds=7), wait_all_ranks=wait_all)
        except RuntimeError as error:
            return str(error)

    results = on_ranks(4, body)
    assert results[0] == f"[Rank 0]: {named} failed to pass monitoredBarrier in 7000 ms"
    assert "rank 0, which monitors it, has failed" in results[2]


def test_the_first_rank_of_a_monitored_barrier_gives_up_first():
    def body():
        rank = dist.get_rank()
        if rank == 1:
            return None
        time.sleep(5 if rank == 0 else 0)
        with pytest.raises(RuntimeError, match="Rank 1 failed" if rank == 0 else "rank 0, which monitors it"):
            dist.monitored_barrier(timeout=timedelta(seconds=7))
        return round(time.monotonic())

    assert on_ranks(3, body) == [12, None, 14]


def test_a_monitored_barrier_that_everybody_comes_to_is_passed():
    def body():
        dist.monitored_barrier()
        dist.monitored_barrier(timeout=timedelta(seconds=1), wait_all_ranks=True)
        return True

    assert on_ranks(4, body) == [True] * 4


def test_who_comes_late_to_a_monitored_barrier_is_told():
    def body():
        time.sleep(dist.get_rank())
        try:
            dist.monitored_barrier(timeout=timedelta(milliseconds=500))
        except RuntimeError as error:
            return str(error)

    first, late = on_ranks(2, body)
    assert first.endswith("Rank 1 failed to pass monitoredBarrier in 500 ms")
    assert "rank 0, which monitors it, has failed or never came" in late


@pytest.mark.parametrize("reads", [2100, 3900])  # until the first rank, or everybody, has given up
def test_who_computes_past_the_end_of_a_monitored_barrier_does_not_save_the_others(reads):
    def body():
        if dist.get_rank() == 2:
            for _ in range(reads):
                time.monotonic()  # a microsecond each: nobody else wakes up meanwhile
        try:
            dist.monitored_barrier(timeout=timedelta(milliseconds=1))
        except RuntimeError as error:
            return str(error)

    first, second, late = on_ranks(3, body)
    assert first == "[Rank 0]: Rank 2 failed to pass monitoredBarrier in 1 ms"
    assert "rank 0, which monitors it, has failed" in second
    assert "rank 0, which monitors it, has failed" in late


def test_who_waits_in_a_monitored_barrier_that_its_first_rank_gave_up_is_told():
    def body():
        time.sleep([0, 0, 1.5][dist.get_rank()])
        try:
            dist.monitored_barrier(timeout=timedelta(seconds=1))
        except RuntimeError as error:
            return round(time.monotonic(), 2), str(error)

    assert [when for when, _ in on_ranks(3, body)] == [1.0, 2.0, 1.5]


# -- nothing is forgotten ---------------------------------------------------------------------------------------------


def _old_and_new(old, new):
    """Both names of one function: the old one warns in torch 2.13."""

    def call(rank, size):
        for name in (old, new):
            function = getattr(dist, name, None)
            if function is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)
                    if "gather" in name:
                        output = torch.empty(size)
                        function(output, torch.tensor([float(rank)]))
                        assert output.tolist() == list(range(size))
                    else:
                        output = torch.empty(1)
                        function(output, torch.arange(float(size)))
                        assert output.item() == size * rank

    return call


def _batch(rank, size):
    received = torch.empty(1)
    operations = [
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
        dist.P2POp(dist.isend, torch.tensor([float(rank)]), (rank + 1) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert received.item() == (rank - 1) % size


def _objects(rank, size):
    gathered, collected, scattered = [None] * size, [None] * size, [None]
    dist.all_gather_object(gathered, rank)
    dist.gather_object(rank, collected if rank == 0 else None)
    dist.scatter_object_list(scattered, list(range(size)) if rank == 0 else None)
    shared = [rank]
    dist.broadcast_object_list(shared, 1)
    assert (gathered, scattered, shared) == (list(range(size)), [rank], [1])
    if rank == 0:
        dist.send_object_list(["hello"], 1)
    if rank == 1:
        dist.recv_object_list(shared, 0)
        assert shared == ["hello"]


def _lists(rank, size):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        tensors, outputs = [torch.ones(1)], [[torch.empty(1)] for _ in range(size)]
        dist.all_reduce_coalesced(tensors)
        dist.all_gather_coalesced(outputs, tensors)
        assert [output.item() for (output,) in outputs] == [size] * size


def _sums(rank, size):
    check_reductions(rank, size, ["SUM"], torch.float32)


def _messages(rank, size):
    send_and_receive(rank, size, lambda owner: values(owner, (3,), torch.float32))
    tensor = torch.empty(1)
    if rank == 0:
        dist.send(torch.ones(1), 1)
    if rank == 1:
        dist.irecv(tensor, 0).wait()
        assert tensor.item() == 1


def _barriers(rank, size):
    dist.barrier()
    dist.monitored_barrier()


def _moves(rank, size):
    for move in MOVES:
        move(rank, size, lambda owner: values(owner, (2,), torch.float32))


def _new_groups(rank, size):
    dist.destroy_process_group(dist.new_group([1, 0]))
    mine, groups = dist.new_subgroups_by_enumeration([[0, 2], [1]])
    assert dist.get_world_size(mine) == (1 if rank == 1 else 2)
    assert len(groups) == 2
    mine, _ = dist.new_subgroups(3)
    assert dist.get_process_group_ranks(mine) == [0, 1, 2]


def _split(rank, size):
    assert dist.get_process_group_ranks(dist.split_group(split_ranks=[[0, 1], [2]])) == ([2] if rank == 2 else [0, 1])


COVERED = {
    _sums: ["all_reduce", "reduce", "reduce_scatter"],
    _moves: ["all_gather", "broadcast", "gather", "scatter", "all_to_all", "all_to_all_single"],
    _old_and_new("all_gather_into_tensor", "all_gather_single"): ["all_gather_into_tensor", "all_gather_single"],
    _old_and_new("reduce_scatter_tensor", "reduce_scatter_single"): ["reduce_scatter_tensor", "reduce_scatter_single"],
    _lists: ["all_reduce_coalesced", "all_gather_coalesced"],
    _messages: ["send", "recv", "isend", "irecv"],
    _batch: ["batch_isend_irecv"],
    _barriers: ["barrier", "monitored_barrier"],
    _objects: [
        "all_gather_object",
        "gather_object",
        "scatter_object_list",
        "broadcast_object_list",
        "send_object_list",
        "recv_object_list",
    ],
    _new_groups: ["new_group", "new_subgroups", "new_subgroups_by_enumeration", "destroy_process_group"],
    _split: ["split_group"],
}
REFUSED = {"shrink_group": lambda: dist.shrink_group([1])}
"""Calls that no simulated group takes; ``docs/process-group.md`` says why."""

NO_COLLECTIVES = {
    "get_backend",
    "get_backend_config",
    "get_debug_level",
    "get_default_backend_for_device",
    "get_global_rank",
    "get_group_rank",
    "get_node_local_rank",
    "get_pg_count",
    "get_process_group_ranks",
    "get_rank",
    "get_world_size",
    "init_process_group",
    "is_backend_available",
    "is_gloo_available",
    "is_initialized",
    "is_mpi_available",
    "is_nccl_available",
    "is_torchelastic_launched",
    "is_ucc_available",
    "is_xccl_available",
    "record_comm",
    "supports_complex",
}


def public_functions():
    return {name for name in c10d.__all__ if name != "reduce_op" and inspect.isfunction(getattr(c10d, name))}


def test_every_public_collective_of_torch_is_tested_or_refused():
    tested = {name for names in COVERED.values() for name in names}
    listed = tested | set(REFUSED) | NO_COLLECTIVES
    assert public_functions() - listed == set(), "neither tested nor refused: add it to a table above"
    assert tested & set(REFUSED) == set()


@pytest.mark.parametrize("call", COVERED, ids=[" ".join(names) for names in COVERED.values()])
def test_a_public_collective_works(call):
    def main():
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", 0))
        if call is _barriers:
            dist.destroy_process_group()
            dist.init_process_group("gloo")
        call(dist.get_rank(), dist.get_world_size())
        dist.destroy_process_group()

    SimWorld(3, strict=True).run(main)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_collective_says_so_and_is_documented(name):
    assert f"`{name}`" in DOCS.read_text()
    if hasattr(dist, name):
        with pytest.raises(RankFailedError, match="does not support"):
            on_ranks(2, REFUSED[name], backend="nccl")
