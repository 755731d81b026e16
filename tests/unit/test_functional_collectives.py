"""Functional collectives, which go through C++ and back, and the ones that autograd knows."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.nn.functional as dnn
from simulated_ranks import on_ranks

from lightrft.errors import DeadlockError, RankFailedError
from lightrft.sim import works

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch 2.13 renames some of them

SIZE = 3
RANKS = list(range(SIZE))


def mine(count=2, scale=1.0):
    return (torch.arange(float(count)) + 10 * dist.get_rank()) * scale


def everybodys(count=2, scale=1.0):
    return [(torch.arange(float(count)) + 10 * rank) * scale for rank in RANKS]


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "expected"), [("sum", [30, 33]), ("avg", [10, 11]), ("min", [0, 1]), ("max", [20, 21])])
def test_all_reduce_leaves_its_input_alone(op, expected):
    def body():
        tensor = mine()
        result = fc.all_reduce(tensor, op, dist.group.WORLD)
        assert isinstance(result, fc.AsyncCollectiveTensor)
        assert tensor.equal(mine())
        return result.tolist()

    assert on_ranks(SIZE, body) == [expected] * SIZE


def test_broadcast():
    assert on_ranks(SIZE, lambda: fc.broadcast(mine(), 1, dist.group.WORLD).tolist()) == [[10.0, 11.0]] * SIZE


@pytest.mark.parametrize("dim", [0, 1])
def test_all_gather_and_reduce_scatter_take_a_dimension(dim):
    def body():
        gathered = fc.all_gather_tensor(torch.full((2, 2), float(dist.get_rank())), dim, dist.group.WORLD)
        scattered = fc.reduce_scatter_tensor(torch.arange(36.0).reshape(6, 6), "sum", dim, dist.group.WORLD)
        assert gathered.equal(torch.cat([torch.full((2, 2), float(rank)) for rank in RANKS], dim))
        assert scattered.equal(torch.arange(36.0).reshape(6, 6).chunk(SIZE, dim)[dist.get_rank()] * SIZE)

    on_ranks(SIZE, body)


def test_all_to_all_single():
    def body():
        even = fc.all_to_all_single(mine(SIZE), None, None, dist.group.WORLD)
        rank = dist.get_rank()
        uneven = fc.all_to_all_single(torch.full((rank * SIZE,), float(rank)), RANKS, [rank] * SIZE, dist.group.WORLD)
        return even.tolist(), uneven.tolist()

    for rank, (even, uneven) in enumerate(on_ranks(SIZE, body)):
        assert even == [10.0 * sender + rank for sender in RANKS]
        assert uneven == [1.0, 2.0, 2.0]


def test_coalesced():
    def body():
        rank = dist.get_rank()
        sums = fc.all_reduce_coalesced([mine(), mine(1)], "sum", dist.group.WORLD)
        gathered = fc.all_gather_into_tensor_coalesced([torch.tensor([float(rank)]), mine()], dist.group.WORLD)
        parts = fc.reduce_scatter_tensor_coalesced(
            [torch.arange(3.0), torch.arange(6.0)], "sum", [0, 0], dist.group.WORLD
        )
        return [[tensor.tolist() for tensor in tensors] for tensors in (sums, gathered, parts)]

    for rank, (sums, gathered, parts) in enumerate(on_ranks(SIZE, body)):
        assert sums == [[30.0, 33.0], [30.0]]
        assert gathered == [[0.0, 1.0, 2.0], [0.0, 1.0, 10.0, 11.0, 20.0, 21.0]]
        assert parts == [[3.0 * rank], [6.0 * rank, 6.0 * rank + 3]]


def test_complex_numbers_are_added():
    def body():
        return fc.all_reduce(torch.tensor([1 + 1j]) * (dist.get_rank() + 1), "sum", dist.group.WORLD).tolist()

    assert on_ranks(SIZE, body) == [[6 + 6j]] * SIZE


def test_permute_tensor_moves_each_tensor_on():
    def body():
        return fc.permute_tensor(mine(), [1, 2, 0], dist.group.WORLD).tolist()

    assert on_ranks(SIZE, body) == [[20.0, 21.0], [0.0, 1.0], [10.0, 11.0]]


def test_tensors_that_are_not_contiguous_are_made_so():
    def body():
        return fc.all_reduce(torch.arange(6.0).reshape(2, 3).t(), "sum", dist.group.WORLD).tolist()

    assert on_ranks(SIZE, body)[0] == (torch.arange(6.0).reshape(2, 3).t() * SIZE).tolist()


def test_groups_meshes_and_names_all_say_who_takes_part():
    def body():
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        group = mesh.get_group("tp")
        one = torch.tensor([float(dist.get_rank())])
        return [fc.all_reduce(one, "sum", how).item() for how in (group, (mesh, 1), mesh["tp"], dist.group.WORLD)]

    assert on_ranks(4, body) == [[1.0, 1.0, 1.0, 6.0]] * 2 + [[5.0, 5.0, 5.0, 6.0]] * 2


# -- asynchronous tensors ---------------------------------------------------------------------------------------------


def test_an_asynchronous_tensor_waits_when_it_is_used():
    def body():
        result = fc.all_reduce(mine(), "sum", dist.group.WORLD)
        doubled = result * 2
        assert type(doubled) is torch.Tensor
        return doubled.tolist(), result.tolist(), fc.wait_tensor(result).tolist()

    assert on_ranks(SIZE, body) == [([60.0, 66.0], [30.0, 33.0], [30.0, 33.0])] * SIZE


def test_several_may_be_under_way_and_used_in_any_order():
    def body():
        results = [fc.all_reduce(torch.full((2,), float(value)), "sum", dist.group.WORLD) for value in range(4)]
        order = [3, 1, 0, 2] if dist.get_rank() else [0, 1, 2, 3]
        return sorted((position, (results[position] + 0).sum().item()) for position in order)

    assert on_ranks(SIZE, body) == [[(value, 2.0 * SIZE * value) for value in range(4)]] * SIZE


def test_an_asynchronous_tensor_may_go_into_the_next_collective():
    def body():
        result = fc.all_reduce(mine(), "sum", dist.group.WORLD)
        gathered = [torch.empty(2) for _ in RANKS]
        dist.all_gather(gathered, result)
        again = fc.all_gather_tensor(fc.all_reduce(mine(), "sum", dist.group.WORLD), 0, dist.group.WORLD)
        dist.all_reduce(result)
        return [tensor.tolist() for tensor in (*gathered, again, result)]

    assert on_ranks(SIZE, body) == [[[30.0, 33.0]] * 3 + [[30.0, 33.0] * 3, [90.0, 99.0]]] * SIZE


def test_the_in_place_forms_used_by_compiled_code_work():
    def body():
        group = dist.group.WORLD.group_name
        reduced, gathered = mine(), torch.ops._c10d_functional.all_gather_into_tensor(mine(), SIZE, group)
        work = torch.ops._c10d_functional.all_reduce_(reduced, "sum", group)
        waited = [torch.ops._c10d_functional.wait_tensor(tensor).tolist() for tensor in (work, gathered)]
        return waited, reduced.tolist()

    assert on_ranks(SIZE, body)[1] == ([[30.0, 33.0], [0.0, 1.0, 10.0, 11.0, 20.0, 21.0]], [30.0, 33.0])


# -- autograd ---------------------------------------------------------------------------------------------------------


def gradients(call, weigh, count=2, **options):
    """Per rank: the gradient of ``sum of weigh(rank, outputs)`` over all ranks, and the value on the rank."""

    def body():
        rank = dist.get_rank()
        tensor = mine(count).requires_grad_()
        loss = weigh(rank, call(tensor))
        loss.backward()
        return loss.item(), tensor.grad

    return on_ranks(SIZE, body, **options)


def reference(call, weigh, count=2):
    """The same, by one process: ``call`` maps everybody's tensors to everybody's outputs."""
    tensors = [tensor.requires_grad_() for tensor in everybodys(count)]
    losses = [weigh(rank, output) for rank, output in enumerate(call(tensors))]
    torch.stack(losses).sum().backward()
    return [(loss.item(), tensor.grad) for loss, tensor in zip(losses, tensors, strict=True)]


def weighted(rank, output):
    """A loss in which every element of every rank counts differently."""
    flat = torch.cat([part.reshape(-1) for part in output]) if isinstance(output, (list, tuple)) else output.reshape(-1)
    return (flat**2 * (torch.arange(1.0, flat.numel() + 1) + rank)).sum()


def one(part):
    return [part] * SIZE


AUTOGRAD = {
    "all_gather": (dnn.all_gather, lambda xs: one(torch.cat(xs)), 2),
    "all_reduce": (dnn.all_reduce, lambda xs: one(sum(xs)), 2),
    "all_to_all": (
        lambda x: dnn.all_to_all([torch.empty(1) for _ in RANKS], list(x.chunk(SIZE))),
        lambda xs: [torch.cat([x.chunk(SIZE)[rank] for x in xs]) for rank in RANKS],
        3,
    ),
    "all_to_all_single": (
        lambda x: dnn.all_to_all_single(torch.empty(3), x),
        lambda xs: [torch.cat([x.chunk(SIZE)[rank] for x in xs]) for rank in RANKS],
        3,
    ),
    "broadcast": (lambda x: dnn.broadcast(x, 1), lambda xs: one(xs[1] + 0 * sum(xs)), 2),
    "reduce_scatter": (
        lambda x: dnn.reduce_scatter(torch.empty(2), list(x.chunk(SIZE))),
        lambda xs: list(sum(xs).chunk(SIZE)),
        6,
    ),
    "scatter": (
        lambda x: dnn.scatter(list(x.chunk(SIZE)), 1),
        lambda xs: [xs[1].chunk(SIZE)[rank] + 0 * sum(x.sum() for x in xs) for rank in RANKS],
        6,
    ),
    "functional all_gather": (
        lambda x: fc.all_gather_tensor_autograd(x, 0, dist.group.WORLD),
        lambda xs: one(torch.cat(xs)),
        2,
    ),
    "functional reduce_scatter": (
        lambda x: fc.reduce_scatter_tensor_autograd(x, "sum", 0, dist.group.WORLD),
        lambda xs: list(sum(xs).chunk(SIZE)),
        6,
    ),
    "functional all_to_all_single": (
        lambda x: fc.all_to_all_single_autograd(x, None, None, dist.group.WORLD),
        lambda xs: [torch.cat([x.chunk(SIZE)[rank] for x in xs]) for rank in RANKS],
        3,
    ),
}


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("name", AUTOGRAD)
def test_gradients_are_those_of_one_process(name, backend):
    call, formula, count = AUTOGRAD[name]
    found, expected = gradients(call, weighted, count, backend=backend), reference(formula, weighted, count)
    for (loss, gradient), (right_loss, right_gradient) in zip(found, expected, strict=True):
        assert loss == pytest.approx(right_loss)
        torch.testing.assert_close(gradient, right_gradient)


def at_root(rank, output):
    return weighted(rank, output) if rank == 1 else weighted(rank, output).nan_to_num() * 0


def test_gradients_through_gather_and_reduce_come_from_the_root():
    gathered = gradients(lambda x: dnn.gather(x, 1), at_root)
    expected = reference(lambda xs: one(torch.cat(xs)), at_root)
    for (_, gradient), (_, right) in zip(gathered, expected, strict=True):
        torch.testing.assert_close(gradient, right)

    def body():
        tensor = mine().requires_grad_()
        result = dnn.reduce(tensor, 1)
        at_the_others = 0 * result.sum()  # of poison, whose gradient is 0 all the same
        (weighted(1, result) if dist.get_rank() == 1 else at_the_others).backward()
        return tensor.grad

    for gradient, (_, right) in zip(on_ranks(SIZE, body), reference(lambda xs: one(sum(xs)), at_root), strict=True):
        torch.testing.assert_close(gradient, right)


def test_what_torch_offers_for_nccl_alone_is_refused_on_gloo():
    def body():
        tensor = mine().requires_grad_()
        (dnn._all_gather_base(torch.empty(2 * SIZE), tensor) * torch.ones(2 * SIZE)).sum().backward()
        return tensor.grad.tolist()

    with pytest.raises(RankFailedError, match="Backend not supported"):
        on_ranks(SIZE, body)
    assert on_ranks(SIZE, body, backend="nccl") == [[3.0, 3.0]] * SIZE


def test_gradients_are_reduced_by_hooks_on_the_rank_that_runs_backward():
    def body():
        weight = torch.full((2,), 1.0, requires_grad=True)
        works, owner = [], dist.get_rank()

        def reduce(gradient):
            assert dist.get_rank() == owner
            works.append(dist.all_reduce(gradient, async_op=True))

        weight.register_hook(reduce)
        (weight * (dist.get_rank() + 1)).sum().backward()
        return len(works)

    with pytest.warns(match="never waited for"):
        assert on_ranks(SIZE, body) == [1] * SIZE


# -- what nobody waits for --------------------------------------------------------------------------------------------


@pytest.fixture
def left_in_register(monkeypatch):
    """How many works torch's register holds when a thread of a rank has ended; one number for each thread."""
    register = getattr(torch._C._distributed_c10d, "_get_work_registry_size", None)
    if register is None:
        pytest.skip("this release of torch does not show its register")
    sizes, let_go = [], works.let_go

    def look(abandoned):
        before = register()
        let_go(abandoned)
        sizes.append((before, register()))

    monkeypatch.setattr(works, "let_go", look)
    return sizes


def issue_three():
    fc.all_reduce(torch.ones(2), "sum", dist.group.WORLD)
    fc.all_gather_tensor(torch.ones(2), 0, dist.group.WORLD)
    fc.all_reduce_coalesced([torch.ones(2), torch.ones(3)], "sum", dist.group.WORLD)


def test_a_run_that_fails_leaves_nothing_in_torch_s_register(left_in_register):
    def body():
        issue_three()
        if dist.get_rank() == 1:
            raise ValueError("no luck")
        dist.barrier()

    with pytest.raises(RankFailedError, match="no luck"):
        on_ranks(SIZE, body)
    assert left_in_register == [(4, 0)] * SIZE


def test_works_that_can_never_complete_are_let_go_too(left_in_register):
    def body():
        if dist.get_rank() != 1:
            fc.all_reduce(torch.ones(2), "sum", dist.group.WORLD)
            dist.barrier()

    with pytest.raises(DeadlockError):
        on_ranks(SIZE, body)
    assert sorted(left_in_register) == [(0, 0), (1, 0), (1, 0)]


@pytest.mark.filterwarnings("ignore::lightrft.errors.SimWarning")
def test_outputs_that_a_rank_or_its_thread_drops_are_let_go(left_in_register):
    def body():
        thread = threading.Thread(target=issue_three)
        thread.start()
        thread.join()
        issue_three()
        dist.barrier()

    on_ranks(SIZE, body)
    assert left_in_register == [(4, 0)] * 2 * SIZE
