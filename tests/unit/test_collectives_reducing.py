"""Collectives that reduce."""

import pytest
import torch
import torch.distributed as dist
from collective_values import NUMBERS, check_reductions
from simulated_ranks import on_ranks, reduce_scatter_single


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
