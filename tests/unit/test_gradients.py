"""K03: one norm over all gradients, whole or sharded, and clipping by it."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import results_and_collectives
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lightrft.errors import ConfigError
from lightrft.strategy.utils.gradients import clip_by_global_norm, global_norm

NORMS = [1.0, 2.0, 3.0, math.inf]


def network():
    """Parameters whose first dimension no number of ranks divides, one that is frozen and one that is not used."""
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"a": nn.Linear(5, 7), "b": nn.Linear(7, 3), "frozen": nn.Linear(2, 2), "unused": nn.Linear(2, 2)}
    )
    model["frozen"].requires_grad_(False)
    return model


def whole_gradients(scale=1.0):
    """The gradients that every test below gives to the parameters of ``network()``, by name."""
    generator = torch.Generator().manual_seed(1)
    used = {name: p for name, p in network().named_parameters() if name.startswith(("a", "b"))}
    return {name: scale * torch.randn(p.shape, generator=generator) for name, p in used.items()}


def give_gradients(model, gradients):
    for name, parameter in model.named_parameters():
        if name in gradients:
            grad = gradients[name].to(parameter.dtype)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = grad


def expected_norm(norm_type, scale=1.0):
    flat = torch.cat([g.flatten() for g in whole_gradients(scale).values()]).double()
    return torch.linalg.vector_norm(flat, norm_type).item()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def plain(model):
    return model


def sharded(model):
    for part in model.values():
        fully_shard(part)
    return model


def replicated_and_sharded(model):
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size // 2, 2) if size > 1 else (1, 1), mesh_dim_names=("replicate", "shard"))
    for part in model.values():
        fully_shard(part, mesh=mesh)
    return model


def partly_sharded(model):
    fully_shard(model["a"])
    return model


def of_several_meshes(model):
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (max(size // 2, 1), min(size, 2)), mesh_dim_names=("replicate", "shard"))
    fully_shard(model["a"], mesh=mesh)
    fully_shard(model["b"])
    fully_shard(model["unused"], mesh=mesh["shard"])
    return model


def in_halves(model):
    """Each pair of ranks shards a copy of its own: meshes of the pair alone."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (max(size // 2, 1), min(size, 2)), mesh_dim_names=("replicate", "shard"))
    fully_shard(model["a"], mesh=mesh["shard"])
    return model


LAYOUTS = [plain, sharded, replicated_and_sharded, partly_sharded, of_several_meshes, in_halves]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("size", [1, 2, 4])
@each_layout
def test_k03_the_norm_is_that_of_one_process(layout, size, norm_type):
    def body():
        model = layout(network())
        give_gradients(model, whole_gradients())
        return global_norm(model.parameters(), norm_type)

    norms, _ = results_and_collectives(size, body)
    assert norms == [pytest.approx(expected_norm(norm_type), rel=1e-6)] * size
    assert len(set(norms)) == 1


@pytest.mark.parametrize("size", [2, 4])
@each_layout
def test_k03_the_norm_takes_one_collective_if_something_is_sharded_and_none_otherwise(layout, size):
    def body():
        model = layout(network())
        give_gradients(model, whole_gradients())
        dist.barrier()
        clip_by_global_norm(model.parameters(), 0.1)
        dist.barrier()

    collectives = results_and_collectives(size, body)[1]
    first = collectives.index("barrier")
    last = len(collectives) - 1 - collectives[::-1].index("barrier")
    assert collectives[first + 1 : last] == ["all_reduce"] * (layout is not plain)


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 1e6])
@pytest.mark.parametrize("size", [1, 2, 4])
@each_layout
def test_k03_clipping_is_that_of_torch(layout, size, max_norm):
    reference = network()
    give_gradients(reference, whole_gradients())
    norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), max_norm).item()
    expected = {name: p.grad for name, p in reference.named_parameters() if p.grad is not None}

    def body():
        model = layout(network())
        give_gradients(model, whole_gradients())
        before = clip_by_global_norm(model.parameters(), max_norm)
        return before, {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}

    for before, gradients in results_and_collectives(size, body)[0]:
        assert before == pytest.approx(norm, rel=1e-6)
        assert list(gradients) == list(expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1, 2])
def test_k03_torch_clips_fsdp_parameters_alike(size):
    def body():
        models = [sharded(network()), sharded(network())]
        for model in models:
            give_gradients(model, whole_gradients())
        mine = clip_by_global_norm(models[0].parameters(), 0.5)
        theirs = torch.nn.utils.clip_grad_norm_(models[1].parameters(), 0.5).full_tensor().item()
        pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
        return mine, theirs, [(whole(a.grad), whole(b.grad)) for a, b in pairs if a.grad is not None]

    for mine, theirs, pairs in results_and_collectives(size, body)[0]:
        assert mine == pytest.approx(theirs, rel=1e-6)
        assert len(pairs) == 4
        for left, right in pairs:
            torch.testing.assert_close(left, right, rtol=1e-6, atol=0)


def test_k03_gradients_of_a_real_backward_pass_have_the_norm_of_one_process():
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))

    def loss(model, batch):
        return model["b"](model["a"](batch).relu()).pow(2).mean()

    reference = network()
    loss(reference, inputs).backward()
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0).item()

    def body():
        model = network()
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model["a"], mesh=mesh)
        fully_shard(model["b"], mesh=mesh)
        loss(model, inputs.chunk(4)[dist.get_rank()]).backward()
        return global_norm(model.parameters())

    assert results_and_collectives(4, body)[0] == [pytest.approx(expected, rel=1e-5)] * 4


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("layout", [plain, sharded], ids=["plain", "sharded"])
def test_k03_zero_never_clips_and_the_norm_is_reported_all_the_same(layout, size):
    def body():
        model = layout(network())
        give_gradients(model, whole_gradients(1e4))
        before = copy.deepcopy([whole(p.grad) for p in model.parameters() if p.grad is not None])
        norm = clip_by_global_norm(model.parameters(), 0)
        after = [whole(p.grad) for p in model.parameters() if p.grad is not None]
        return norm, all(torch.equal(x, y) for x, y in zip(before, after, strict=True))

    assert results_and_collectives(size, body)[0] == [(pytest.approx(expected_norm(2.0, 1e4), rel=1e-6), True)] * size


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("layout", [plain, sharded, replicated_and_sharded], ids=lambda layout: layout.__name__)
def test_k03_a_norm_that_is_not_finite_is_reported_and_leaves_the_gradients_alone(layout, norm_type, value):
    def body():
        model = layout(network())
        gradients = whole_gradients()
        gradients["b.weight"][2, 0] = value  # with two shards, it lies on rank 1 alone
        give_gradients(model, gradients)
        norm = clip_by_global_norm(model.parameters(), 0.1, norm_type)
        after = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        alike = all(torch.equal(after[name], gradients[name]) for name in gradients if name != "b.weight")
        return str(norm), alike, len(after)

    assert results_and_collectives(2, body)[0] == [(str(value), True, 4)] * 2


def test_k03_parameters_that_are_given_twice_count_once():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_by_global_norm([weight, weight], 1.0) == pytest.approx(5.0)
    torch.testing.assert_close(weight.grad, torch.tensor([0.6, 0.8]))


def test_k03_the_norm_spans_the_parameters_of_several_optimizers():
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for parameter, gradient in zip(parameters, (3.0, 4.0), strict=True):
        parameter.grad = torch.tensor([gradient])
    optimizers = [torch.optim.SGD([parameter], lr=1.0) for parameter in parameters]
    assert global_norm(p for o in optimizers for g in o.param_groups for p in g["params"]) == pytest.approx(5.0)


def test_k03_without_any_gradient_the_norm_is_zero():
    assert [global_norm(network().parameters(), norm_type) for norm_type in NORMS] == [0.0] * 4
    assert clip_by_global_norm([], 1.0) == 0.0
    assert results_and_collectives(2, lambda: global_norm(sharded(network()).parameters()))[0] == [0.0, 0.0]


def test_k03_a_rank_whose_shard_is_empty_takes_part():
    def body():
        model = fully_shard(nn.Linear(2, 1))
        model.weight.grad = distribute_tensor(torch.tensor([[3.0, 4.0]]), model.weight.device_mesh, [Shard(0)])
        return [clip_by_global_norm(model.parameters(), 1.0, norm_type) for norm_type in (2.0, math.inf)]

    assert results_and_collectives(4, body)[0] == [[pytest.approx(5.0), pytest.approx(0.8)]] * 4


def test_k03_a_partial_sum_counts_with_its_value():
    def body():
        mesh = init_device_mesh("cpu", (2,))
        parameter = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
        local = torch.tensor([3.0, 1.0]) if dist.get_rank() else torch.tensor([0.0, 3.0])
        parameter.grad = DTensor.from_local(local, mesh, [Partial()])
        return global_norm([parameter])

    assert results_and_collectives(2, body)[0] == [pytest.approx(5.0)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_k03_the_norm_of_other_dtypes_is_computed_in_float32_at_least(dtype):
    parameters = [nn.Parameter(torch.zeros(1000, dtype=dtype)), nn.Parameter(torch.zeros(1, dtype=torch.float32))]
    parameters[0].grad = torch.full((1000,), 300.0, dtype=dtype)  # squares overflow float16, and add up in no 16 bits
    parameters[1].grad = torch.tensor([1.0])
    assert global_norm(parameters) == pytest.approx(math.sqrt(1000 * 300.0**2 + 1), rel=1e-7)
    clip_by_global_norm(parameters, 1.0)
    assert [p.grad.dtype for p in parameters] == [dtype, torch.float32]
    rounding = torch.finfo(dtype).eps + 1e-7  # half of it each for the scale and for the product
    assert global_norm(parameters) == pytest.approx(1.0, rel=rounding)


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_k03_a_bound_that_is_none_is_an_error(max_norm):
    with pytest.raises(ConfigError, match=r"max_norm=.*expected 0 \(no clipping\) or a positive number"):
        clip_by_global_norm([], max_norm)


@pytest.mark.parametrize("norm_type", [0.0, -2.0, math.nan])
def test_k03_a_norm_that_is_none_is_an_error(norm_type):
    with pytest.raises(ConfigError, match=r"norm_type=.*expected a positive number"):
        global_norm([], norm_type)
