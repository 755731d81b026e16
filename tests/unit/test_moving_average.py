"""Moving averages of weights, whole and sharded."""

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import results_and_collectives
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.strategy.utils.moving_average import FineAverages, copy_buffers, update


def test_an_average_moves_towards_the_parameter_in_place():
    parameter, average = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 10.0])
    storage = average.data_ptr()
    update([("w", parameter)], [("w", average)], 0.75)
    assert average.tolist() == [0.75 * 3 + 0.25 * 1, 0.75 * 10 + 0.25 * 2]
    assert parameter.tolist() == [1.0, 2.0]
    assert average.data_ptr() == storage


def test_steps_add_up_to_the_weighted_sum_of_all_parameters():
    beta, values = 0.9, [5.0, -2.0, 7.0, 1.0]
    average = torch.tensor(3.0, dtype=torch.float64)
    for value in values:
        update([("w", torch.tensor(value, dtype=torch.float64))], [("w", average)], beta)
    weights = [(1 - beta) * beta ** (len(values) - 1 - i) for i in range(len(values))]
    expected = 3.0 * beta ** len(values) + sum(w * v for w, v in zip(weights, values, strict=True))
    assert average.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 1.0), (1.0, 3.0)])
def test_the_ends_of_beta(beta, expected):
    average = torch.tensor([3.0])
    update([("w", torch.tensor([1.0]))], [("w", average)], beta)
    assert average.tolist() == [expected]


def test_models_with_gradients_and_other_orders_are_averaged():
    torch.manual_seed(0)
    model, averaged = nn.Linear(2, 2), nn.Linear(2, 2)
    expected = {name: 0.5 * p + 0.5 * averaged.get_parameter(name) for name, p in model.named_parameters()}
    update(model.named_parameters(), reversed(list(averaged.named_parameters())), 0.5)
    for name, parameter in averaged.named_parameters():
        torch.testing.assert_close(parameter, expected[name])
        assert parameter.is_leaf


@pytest.mark.parametrize("average_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_computed_in_float32_at_least_and_kept_in_the_dtype_of_the_average(dtype, average_dtype):
    generator = torch.Generator().manual_seed(0)
    parameter = torch.randn(200, generator=generator).to(dtype)
    average = torch.randn(200, generator=generator).to(average_dtype)
    wide = torch.float64 if average_dtype == torch.float64 else torch.float32
    exact = average.to(wide) * 0.992 + parameter.to(wide) * (1 - 0.992)
    update([("w", parameter)], [("w", average)], 0.992)
    torch.testing.assert_close(average, exact.to(average_dtype), rtol=2 * torch.finfo(wide).eps, atol=1e-9)
    assert average.dtype == average_dtype


def test_it_is_computed_on_the_device_that_is_asked_for():
    def main():
        average = torch.ones(2, device="cuda")
        update([("w", torch.zeros(2))], [("w", average)], 0.5, device="cuda")
        update([("w", torch.zeros(2, device="cuda"))], [("w", average)], 0.5, device="cpu")
        return average.tolist()

    assert SimWorld(1, cuda=True, stall_limit=15).run(main) == [[0.25, 0.25]]


def test_equal_shards_are_averaged_where_they_lie_without_any_collective():
    def body():
        mesh = init_device_mesh("cpu", (2,))
        parameter, average = (
            DTensor.from_local(torch.full((2,), v), mesh, [Shard(0)], run_check=False) for v in (1.0, 3.0)
        )
        update([("w", parameter)], [("w", average)], 0.5)
        return average.to_local().tolist()

    assert results_and_collectives(2, body) == ([[2.0, 2.0]] * 2, [])


def test_whole_and_sharded_tensors_and_other_placements_mix():
    first, second = torch.arange(10.0).reshape(5, 2), torch.ones(5, 2)
    expected = (0.25 * second + 0.75 * first).tolist()

    def body():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        layouts = [
            lambda values: values.clone(),
            lambda values: distribute_tensor(values.clone(), mesh, [Shard(0)]),
            lambda values: distribute_tensor(values.clone(), mesh, [Shard(1)]),
            lambda values: distribute_tensor(values.clone(), mesh, [Replicate()]),
        ]
        results = []
        for of_parameter in layouts:
            for of_average in layouts:
                parameter, average = of_parameter(first), of_average(second)
                update([("w", parameter)], [("w", average)], 0.25)
                results.append((average.full_tensor() if isinstance(average, DTensor) else average).tolist())
        return results

    assert results_and_collectives(3, body)[0] == [[expected] * 16] * 3


def test_a_whole_tensor_finds_its_shards_without_any_collective():
    def body():
        mesh = init_device_mesh("cpu", (2,))
        average = DTensor.from_local(torch.zeros(2), mesh, [Shard(0)], run_check=False)
        update([("w", torch.arange(4.0))], [("w", average)], 0.5)
        return average.to_local().tolist()

    assert results_and_collectives(2, body) == ([[0.0, 0.5], [1.0, 1.5]], [])


def test_buffers_are_copied():
    model, averaged = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    copy_buffers(model.named_buffers(), averaged.named_buffers())
    assert averaged.num_batches_tracked.item() == 1
    assert torch.equal(averaged.running_mean, model.running_mean)
    assert averaged.running_mean.data_ptr() != model.running_mean.data_ptr()


def test_names_and_shapes_that_differ_are_errors_and_nothing_is_changed():
    average = torch.tensor([3.0])
    with pytest.raises(ConfigError, match=r"lacks \['b'\] and has \['c'\] in addition"):
        update([("a", torch.ones(1)), ("b", torch.ones(1))], [("a", average), ("c", torch.ones(1))], 0.5)
    with pytest.raises(ConfigError, match=r"b has shape \(1,\) in the averaged model and \(2,\) in the model"):
        update([("a", torch.ones(1)), ("b", torch.ones(2))], [("a", average), ("b", torch.ones(1))], 0.5)
    with pytest.raises(ConfigError, match="lacks"):
        copy_buffers([("a", torch.ones(1))], [])
    assert average.item() == 3.0


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan")])
def test_a_beta_out_of_range_is_an_error(beta):
    with pytest.raises(ConfigError, match=r"beta=.*expected a number from 0 to 1"):
        update([], [], beta)


# -- averages of weights in 16 bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_that_16_bits_cannot_show_add_up(dtype):
    fine, average, parameter = FineAverages(), torch.ones(3, dtype=dtype), torch.full((3,), 1.25)
    for _ in range(500):
        fine.update([("w", parameter)], [("w", average)], 0.999)
    expected = 1.25 - 0.25 * 0.999**500
    torch.testing.assert_close(average.float(), torch.full((3,), expected), atol=4e-3, rtol=0)


def test_elements_that_are_written_between_two_updates_count():
    fine, average = FineAverages(), torch.ones(2, dtype=torch.bfloat16)
    for _ in range(3):
        fine.update([("w", torch.full((2,), 1.25))], [("w", average)], 0.999)
    average[0] = -4.0
    fine.update([("w", torch.zeros(2))], [("w", average)], 0.5)
    torch.testing.assert_close(average.float(), torch.tensor([-2.0, 0.5]), atol=2e-3, rtol=0)


def test_weights_in_32_bits_are_averaged_where_they_are():
    fine, average = FineAverages(), torch.ones(2)
    fine.update([("w", torch.zeros(2))], [("w", average)], 0.75)
    assert average.tolist() == [0.75, 0.75]
    assert len(fine._fine) == 0


def test_an_average_in_fp32_goes_with_its_weights():
    fine, average = FineAverages(), torch.ones(2, dtype=torch.bfloat16)
    fine.update([("w", torch.zeros(2))], [("w", average)], 0.75)
    assert len(fine._fine) == 1
    del average
    assert len(fine._fine) == 0
