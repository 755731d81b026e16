"""What collectives leave alone of the tensors that they are given."""

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import all_gather_single, on_ranks, reduce_scatter_single
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightrft.errors import RankFailedError


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
