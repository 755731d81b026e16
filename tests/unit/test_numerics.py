"""In which order reductions add, and how little depends on anything else."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld, collectives
from lightrft.sim.collectives import ORDERS

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.int64, torch.int32, torch.int8, torch.uint8]
SIZE = 5


def part(rank, dtype, count=203):
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator).mul_(3).to(dtype)
    return torch.randint(0, 100, (count,), generator=generator).to(dtype)


def reduced(dtype, op="SUM", *, backend="nccl", **options):
    """The result of an all_reduce of random parts, which must be the same on every rank and in a reduce_scatter."""

    def main():
        dist.init_process_group(backend)
        reduce_op = getattr(dist.ReduceOp, op)
        tensor = part(dist.get_rank(), dtype)
        dist.all_reduce(tensor, reduce_op)
        dist.destroy_process_group()
        return tensor

    results = SimWorld(SIZE, **options).run(main)
    assert all(torch.equal(bits(result), bits(results[0])) for result in results)
    return results[0]


def bits(tensor):
    return tensor.view(torch.uint8)


def one_by_one(dtype, combine):
    """Rank 0's part, then the others added one by one, rounded to ``dtype`` after each step."""
    total = part(0, dtype)
    for rank in range(1, SIZE):
        total = combine(total.float(), part(rank, dtype).float()).to(dtype)
    return total


@pytest.mark.parametrize("dtype", [*FLOATS, *FP8], ids=str)
def test_a_sum_is_taken_in_rank_order_in_the_dtype_of_the_tensor(dtype):
    assert torch.equal(bits(reduced(dtype)), bits(one_by_one(dtype, torch.add)))


@pytest.mark.parametrize("dtype", [*FLOATS, *FP8], ids=str)
def test_a_product_is_taken_in_rank_order_in_the_dtype_of_the_tensor(dtype):
    assert torch.equal(bits(reduced(dtype, "PRODUCT")), bits(one_by_one(dtype, torch.mul)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_average_is_the_sum_divided_by_the_number_of_ranks(dtype):
    assert torch.equal(reduced(dtype, "AVG"), reduced(dtype).div(SIZE))


def test_a_sum_in_bfloat16_loses_what_bfloat16_loses():
    def main():
        dist.init_process_group("gloo")
        tensor = torch.tensor([256.0 if dist.get_rank() == 0 else 1.0], dtype=torch.bfloat16)
        reverse = torch.tensor([256.0 if dist.get_rank() == 3 else 1.0], dtype=torch.bfloat16)
        dist.all_reduce(tensor)
        dist.all_reduce(reverse)
        dist.destroy_process_group()
        return tensor.item(), reverse.item()

    assert SimWorld(4).run(main) == [(256.0, 260.0)] * 4


@pytest.mark.parametrize("numerics", ORDERS)
def test_a_result_depends_on_no_schedule(numerics):
    seeds = [0] if numerics == "permuted" else range(5)  # the seed draws the permutation too
    results = [
        reduced(torch.float32, numerics=numerics),
        *(reduced(torch.float32, numerics=numerics, schedule="random", seed=seed) for seed in seeds),
    ]
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_result_does_not_depend_on_the_number_of_threads_or_the_modes_of_the_last_rank():
    def main():
        dist.init_process_group("gloo")
        tensor = part(dist.get_rank(), torch.float32, 100_003)
        with (
            torch.inference_mode(dist.get_rank() == SIZE - 1),
            torch.autocast("cpu", enabled=dist.get_rank() == SIZE - 1),
        ):
            dist.all_reduce(tensor)
        dist.destroy_process_group()
        return tensor

    total = part(0, torch.float32, 100_003)
    for rank in range(1, SIZE):
        total += part(rank, torch.float32, 100_003)
    assert all(torch.equal(result, total) for result in SimWorld(SIZE).run(main))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_other_orders_show_how_far_a_program_depends_on_the_order(dtype):
    results = [reduced(dtype, numerics=numerics) for numerics in ORDERS]
    for position, result in enumerate(results):
        torch.testing.assert_close(result, results[0], rtol=0.05, atol=0.2)
        assert not any(torch.equal(result, other) for other in results[:position])


def test_permuted_numerics_differ_from_seed_to_seed():
    one, other = (reduced(torch.float32, numerics="permuted", seed=seed) for seed in (1, 2))
    assert not torch.equal(one, other)
    assert torch.equal(one, reduced(torch.float32, numerics="permuted", seed=1))


@pytest.mark.parametrize("op", ["SUM", "PRODUCT", "MIN", "MAX"])
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers_come_out_the_same_in_every_order(dtype, op):
    results = [reduced(dtype, op, numerics=numerics) for numerics in ORDERS]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("op", ["BAND", "BOR", "BXOR"])
def test_bits_come_out_the_same_in_every_order(op):
    results = [reduced(torch.int64, op, backend="gloo", numerics=numerics) for numerics in ORDERS]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("op", ["MIN", "MAX"])
def test_extremes_come_out_the_same_in_every_order(op):
    results = [reduced(torch.bfloat16, op, numerics=numerics) for numerics in ORDERS]
    assert all(torch.equal(result, results[0]) for result in results)


def test_integers_wrap_around_as_on_the_backends():
    def main():
        dist.init_process_group("gloo")
        small, unsigned = torch.tensor([100], dtype=torch.int8), torch.tensor([200], dtype=torch.uint8)
        dist.all_reduce(small)
        dist.all_reduce(unsigned)
        dist.destroy_process_group()
        return small.item(), unsigned.item()

    assert SimWorld(4).run(main) == [(-112, 32)] * 4


def test_a_nan_on_any_rank_reaches_every_rank():
    def main():
        dist.init_process_group("gloo")
        results = []
        for op in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.AVG):
            tensor = torch.tensor([float("nan") if dist.get_rank() == rank else 1.0 for rank in range(3)])
            dist.all_reduce(tensor, op)
            results.append(bool(tensor.isnan().all()))
        dist.destroy_process_group()
        return results

    assert SimWorld(3).run(main) == [[True] * 4] * 3


def test_an_unknown_order_is_refused():
    with pytest.raises(
        ConfigError, match="numerics='butterfly' is unknown: expected one of rank, ring, tree, permuted"
    ):
        SimWorld(2, numerics="butterfly")


# -- the pure functions -----------------------------------------------------------------------------------------------


@given(size=st.integers(1, 9), count=st.integers(0, 40), order=st.sampled_from(ORDERS), seed=st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_every_order_adds_every_part_once(size, count, order, seed):
    parts = [torch.full((count,), 1 << rank, dtype=torch.int64) for rank in range(size)]
    result = collectives.reduce(parts, "SUM", order, seed)
    assert result.tolist() == [(1 << size) - 1] * count


@given(size=st.integers(1, 6), count=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_reduce_scatter_is_reduce_and_then_scatter(size, count):
    inputs = [[torch.arange(float(size * count)) * (rank + 1)] for rank in range(size)]

    def total(tensors):
        return collectives.reduce(tensors, "SUM")

    scattered = collectives.reduce_scatter_single(inputs, total)
    assert torch.cat([part for (part,) in scattered]).equal(total([tensor for (tensor,) in inputs]))


@pytest.mark.parametrize("collective", [collectives.all_gather, collectives.all_gather_single, collectives.all_to_all])
def test_results_share_no_memory_with_inputs(collective):
    inputs = [[torch.full((2,), float(10 * rank + position)) for position in range(3)] for rank in range(3)]
    results = collective(inputs)
    copies = [[tensor.clone() for tensor in result] for result in results]
    for tensors in inputs:
        for tensor in tensors:
            tensor.fill_(-1)
    assert all(
        tensor.equal(copy) for pair in zip(results, copies, strict=True) for tensor, copy in zip(*pair, strict=True)
    )


@pytest.mark.parametrize("order", ORDERS)
def test_a_reduction_leaves_its_inputs_alone(order):
    parts = [torch.full((70_000,), float(rank)) for rank in range(4)]
    collectives.reduce(parts, "SUM", order)
    assert all(torch.equal(tensor, torch.full((70_000,), float(rank))) for rank, tensor in enumerate(parts))
