"""The same small programs on real gloo processes and on simulated ranks: values, refusals, and what gloo corrupts.

Each world runs all programs once, one after the other, and gives back what came of each.
"""

from __future__ import annotations

import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.distributed.nn.functional as dnn
from simulated_ranks import all_gather_single, reduce_scatter_single

from lightrft.sim import ProcessWorld, SimWorld

SIZE = 3
ALL = list(range(SIZE))

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
]
NOT_GLOOS = [
    torch.int16,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
OPS = ["SUM", "AVG", "PRODUCT", "MIN", "MAX", "BAND", "BOR", "BXOR"]

VALUES = {}
"""Programs that end alike in both worlds. A program takes its rank and returns anything that can be compared."""

REFUSED = {}
"""Programs that every rank of both worlds refuses."""

CORRUPTED = {}
"""Programs that gloo takes without complaint and gets wrong, with what would be right; simulated ranks refuse them."""


def value(function):
    VALUES[function.__name__] = function
    return function


def refused(function):
    REFUSED[function.__name__] = function
    return function


def corrupted(right):
    def keep(function):
        CORRUPTED[function.__name__] = (function, right)
        return function

    return keep


def numbers(rank, dtype, count=6):
    """Small whole numbers, exact in every dtype, different for every rank."""
    found = (torch.arange(count) * 3 + rank * 2) % 5
    return torch.complex(found.double(), found.double() + rank).to(dtype) if dtype.is_complex else found.to(dtype)


def zeros(dtype, count=6):
    return torch.zeros(count * dtype.itemsize, dtype=torch.uint8).view(dtype)


def counted(count, start=0):
    return torch.arange(float(count)) + start


def lists(tensors):
    return [tensor.tolist() for tensor in tensors or ()]


def at(root, rank, make):
    return make() if rank == root else None


# -- moving data ------------------------------------------------------------------------------------------------------

MOVES = {
    "broadcast": lambda rank, make: [(t := make(rank), dist.broadcast(t, 1))[0]],
    "all_gather": lambda rank, make: (o := [make(9) for _ in ALL], dist.all_gather(o, make(rank)))[0],
    "all_gather_single": lambda rank, make: [(o := torch.cat([make(9)] * SIZE), all_gather_single(o, make(rank)))[0]],
    "gather": lambda rank, make: (o := at(1, rank, lambda: [make(9) for _ in ALL]), dist.gather(make(rank), o, 1))[0],
    "scatter": lambda rank, make: [
        (o := make(9), dist.scatter(o, at(1, rank, lambda: [make(owner) for owner in ALL]), 1))[0]
    ],
    "all_to_all": lambda rank, make: (o := [make(9) for _ in ALL], dist.all_to_all(o, [make(rank + r) for r in ALL]))[
        0
    ],
    "all_to_all_single": lambda rank, make: [(o := make(9), dist.all_to_all_single(o, make(rank)))[0]],
    "send": lambda rank, make: [around(rank, make)],
}


def around(rank, make):
    """Send to the next rank and receive from the one before."""
    received = make(9)
    works = [dist.isend(make(rank), (rank + 1) % SIZE), dist.irecv(received, (rank - 1) % SIZE)]
    for work in works:
        work.wait()
    return received


def moving(name, dtype):
    def program(rank):
        return [t.view(torch.uint8).tolist() for t in MOVES[name](rank, lambda owner: numbers(owner, dtype)) or ()]

    return program


def moving_nothing_of_gloos(name, dtype):
    def program(rank):
        return [t.view(torch.uint8).tolist() for t in MOVES[name](rank, lambda owner: zeros(dtype)) or ()]

    return program


for name in MOVES:
    for dtype in DTYPES:
        (REFUSED if name == "gather" and dtype.is_complex else VALUES)[f"{name} {dtype}"] = moving(name, dtype)
    for dtype in NOT_GLOOS:
        (VALUES if name == "send" else REFUSED)[f"{name} {dtype}"] = moving_nothing_of_gloos(name, dtype)

# -- reducing ---------------------------------------------------------------------------------------------------------

REDUCTIONS = {
    "all_reduce": lambda rank, t, op: (dist.all_reduce(t, op), t)[1],
    "reduce": lambda rank, t, op: (dist.reduce(t, 1, op), t)[1] if rank == 1 else dist.reduce(t, 1, op),
    "reduce_scatter": lambda rank, t, op: (o := t[:2].clone(), dist.reduce_scatter(o, list(t.chunk(SIZE)), op))[0],
    "reduce_scatter_single": lambda rank, t, op: (o := t[:2].clone(), reduce_scatter_single(o, t, op))[0],
}


def reducing(name, dtype, op):
    def program(rank):
        result = REDUCTIONS[name](rank, numbers(rank, dtype), getattr(dist.ReduceOp, op))
        return None if result is None else result.tolist()

    return program


def has(op, dtype):
    if dtype.is_complex:
        return op in ("SUM", "AVG")
    if op == "AVG":
        return dtype.is_floating_point
    return not (op in ("BAND", "BOR", "BXOR") and dtype.is_floating_point)


for name in REDUCTIONS:
    for dtype in DTYPES:
        for op in OPS:
            (VALUES if has(op, dtype) else REFUSED)[f"{name} {op} {dtype}"] = reducing(name, dtype, op)


@refused
def premul_sum(rank):
    dist.all_reduce(torch.ones(2), dist._make_nccl_premul_sum(2.0))


@value
def integers_wrap_around(rank):
    tensor = torch.tensor([100], dtype=torch.int8)
    dist.all_reduce(tensor)
    return tensor.tolist()


# -- shapes -----------------------------------------------------------------------------------------------------------


def shapes(name, shape):
    def program(rank):
        return lists(MOVES[name](rank, lambda owner: torch.full(shape, float(owner))))

    return program


for name in MOVES:
    splits_a_tensor = name in ("all_gather_single", "all_to_all_single")
    for shape in [(0,), (0, 3), (3, 2)] if splits_a_tensor else [(0,), (0, 3), (3, 2), ()]:
        VALUES[f"{name} of shape {shape}"] = shapes(name, shape)


@value
def same_number_of_elements(rank):
    tensor = torch.ones(4) if rank else torch.ones(2, 2)
    dist.all_reduce(tensor)
    dist.broadcast(tensor, 0)
    return tensor.tolist()


@value
def uneven_reduce_scatter(rank):
    output = torch.empty(rank + 1)
    dist.reduce_scatter(output, [counted(owner + 1, rank) for owner in ALL])
    return output.tolist()


@value
def splits(rank):
    sent = [[1, 0, 2], [0, 3, 1], [2, 2, 0]]
    output = torch.empty(sum(row[rank] for row in sent), 2)
    tensor = torch.arange(2.0 * sum(sent[rank])).reshape(-1, 2) + 100 * rank
    dist.all_to_all_single(output, tensor, [row[rank] for row in sent], sent[rank])
    return output.tolist()


@value
def splits_on_one_side_only(rank):
    output = torch.empty(SIZE)
    dist.all_to_all_single(output, counted(SIZE, 10 * rank), None, [1] * SIZE)
    return output.tolist()


@refused
def uneven_all_gather(rank):
    dist.all_gather([torch.empty(owner + 1) for owner in ALL], torch.ones(rank + 1))


@refused
def uneven_all_to_all(rank):
    dist.all_to_all([torch.empty(owner + 1) for owner in ALL], [torch.ones(owner + 1) for owner in ALL])


@refused
def stacked_all_gather_single(rank):
    all_gather_single(torch.empty(SIZE, 4), torch.ones(4))


@refused
def flat_all_gather_single(rank):
    all_gather_single(torch.empty(SIZE * 4), torch.ones(2, 2))


@refused
def all_gather_single_of_a_scalar(rank):
    all_gather_single(torch.empty(SIZE), torch.tensor(1.0))


@refused
def all_gather_single_too_small(rank):
    all_gather_single(torch.empty(SIZE * 4 + 1), torch.ones(4))


@refused
def all_gather_single_of_another_dtype(rank):
    all_gather_single(torch.empty(SIZE * 4).double(), torch.ones(4))


@refused
def stacked_reduce_scatter_single(rank):
    reduce_scatter_single(torch.empty(4), torch.ones(SIZE, 4))


@refused
def flat_reduce_scatter_single(rank):
    reduce_scatter_single(torch.empty(2, 2), torch.ones(SIZE * 4))


@refused
def all_gather_into_another_shape(rank):
    dist.all_gather([torch.empty(4) for _ in ALL], torch.ones(2, 2))


@refused
def reduce_scatter_into_another_shape(rank):
    dist.reduce_scatter(torch.empty(2, 2), [torch.ones(4) for _ in ALL])


@refused
def all_to_all_into_another_shape(rank):
    dist.all_to_all([torch.empty(4) for _ in ALL], [torch.ones(2, 2) for _ in ALL])


@refused
def splits_that_do_not_add_up(rank):
    dist.all_to_all_single(torch.empty(SIZE), torch.ones(SIZE), [1] * SIZE, [2] * SIZE)


@refused
def a_list_too_long(rank):
    dist.all_gather([torch.empty(1) for _ in range(SIZE + 1)], torch.ones(1))


@refused
def a_list_to_reduce_too_short(rank):
    dist.reduce_scatter(torch.empty(1), [torch.ones(1)])


@refused
def a_root_outside_the_group(rank):
    dist.broadcast(torch.ones(1), SIZE)


@refused
def lists_of_several_dtypes(rank):
    dist.all_gather([torch.empty(1), torch.empty(1).double(), torch.empty(1)], torch.ones(1))


# -- layout -----------------------------------------------------------------------------------------------------------


def strided(rank):
    return counted(8, 10 * rank)[::2]


@value
def strides_where_gloo_copies(rank):
    rows, single, part = torch.zeros(SIZE, 4), torch.zeros(2 * SIZE), torch.zeros(4)
    dist.all_gather([row[::2] for row in rows], strided(rank)[:2])
    all_gather_single(single[::2], torch.full((1,), float(rank)))
    reduce_scatter_single(part[::2], counted(2 * SIZE * 2)[::2])
    gathered = at(0, rank, lambda: torch.zeros(SIZE, 4))
    dist.gather(strided(rank)[:2], at(0, rank, lambda: [row[::2] for row in gathered]))
    exchanged = torch.zeros(SIZE, 4)
    dist.all_to_all([row[::2] for row in exchanged], [strided(rank + receiver)[:2] for receiver in ALL])
    return lists([rows, single, part, *([gathered] if rank == 0 else []), exchanged])


@value
def channels_last(rank):
    tensor = (torch.arange(48.0).reshape(2, 3, 2, 4) + rank).to(memory_format=torch.channels_last)
    dist.all_reduce(tensor)
    dist.broadcast(tensor, 1)
    return tensor.tolist()


@refused
def strided_all_to_all_single(rank):
    dist.all_to_all_single(torch.empty(4), strided(rank))


@refused
def strided_send(rank):
    dist.isend(strided(rank), (rank + 1) % SIZE)


@refused
def strided_receive(rank):
    dist.irecv(strided(rank), (rank + 1) % SIZE)


@corrupted([30.0, 36.0, 42.0, 48.0])
def strided_all_reduce(rank):
    tensor = strided(rank)
    dist.all_reduce(tensor)
    return tensor.tolist()


@corrupted([10.0, 12.0, 14.0, 16.0])
def strided_broadcast(rank):
    tensor = strided(rank)
    dist.broadcast(tensor, 1)
    return tensor.tolist()


@corrupted([1.0, 2.0])
def scatter_into_strides(rank):
    output = torch.zeros(4)[::2]
    dist.scatter(output, at(0, rank, lambda: [counted(2, 1) for _ in ALL]))
    return output.tolist()


@corrupted([3.0, 6.0])
def reduce_scatter_into_strides(rank):
    output = torch.zeros(4)[::2]
    dist.reduce_scatter(output, [counted(2, 1) for _ in ALL])
    return output.tolist()


@corrupted([float(SIZE)] * 3)
def reduce_away_from_the_root(rank):
    tensor = torch.full((3,), float(rank + 1))
    dist.reduce(tensor, 0)
    return [float(SIZE)] * 3 if rank == 0 else (tensor - rank - 1 + SIZE).tolist()


# -- autograd and inference mode --------------------------------------------------------------------------------------


@value
def parameters_in_place(rank):
    parameter = torch.nn.Parameter(torch.full((SIZE,), rank + 1.0))
    dist.broadcast(parameter, 1)
    dist.all_reduce(parameter)
    dist.all_to_all_single(parameter, counted(SIZE, 10 * rank))
    return parameter.tolist(), parameter._version, parameter.grad_fn is None


@value
def version_counters(rank):
    tensors = [torch.zeros(SIZE) for _ in range(7)]
    dist.all_reduce(tensors[0])
    dist.broadcast(tensors[1], 0)
    dist.all_to_all_single(tensors[2], torch.ones(SIZE))
    all_gather_single(tensors[3], torch.ones(1))
    reduce_scatter_single(tensors[4], torch.ones(SIZE * SIZE))
    outputs = [torch.zeros(1) for _ in ALL]
    dist.all_gather(outputs, torch.ones(1))
    dist.scatter(tensors[5], at(0, rank, lambda: [torch.ones(SIZE) for _ in ALL]))
    if rank == 0:
        dist.send(tensors[6], 1)
    if rank == 1:
        dist.recv(tensors[6], 0)
    return [tensor._version > 0 for tensor in (*tensors, *outputs)]


def leaf(count=1):
    return torch.zeros(count, requires_grad=True)


def of_the_graph():
    """Gloo refuses it only if autograd looks before gloo's thread has written: often, but not always."""
    errors = []
    for _ in range(20):
        try:
            all_gather_single(torch.empty(SIZE), leaf() * 2)
        except RuntimeError as error:
            errors.append(error)
    if errors:
        raise errors[0]


for name, call in {
    "all_gather": lambda: dist.all_gather([leaf() for _ in ALL], torch.ones(1)),
    "all_gather_single": lambda: all_gather_single(leaf(SIZE), torch.ones(1)),
    "all_gather_single of the graph": of_the_graph,
    "reduce_scatter": lambda: dist.reduce_scatter(leaf(), [torch.ones(1) for _ in ALL]),
    "reduce_scatter_single": lambda: reduce_scatter_single(leaf(), torch.ones(SIZE)),
    "all_to_all": lambda: dist.all_to_all([leaf() for _ in ALL], [torch.ones(1) for _ in ALL]),
}.items():
    REFUSED[f"{name} into a parameter"] = lambda rank, call=call: call()
    VALUES[f"{name} into a parameter, without autograd"] = lambda rank, call=call: torch.no_grad()(call)()


@value
def inference_mode_on_one_rank(rank):
    with torch.inference_mode(rank == 1):
        tensor, gathered = torch.ones(2) + rank, torch.zeros(2 * SIZE)
        dist.all_reduce(tensor)
        all_gather_single(gathered, tensor)
    return tensor.tolist(), gathered.tolist()


@refused
def a_list_of_inference_mode_outside_of_it(rank):
    with torch.inference_mode():
        outputs = [torch.empty(1) for _ in ALL]
    dist.all_gather(outputs, torch.ones(1))


@value
def tensors_of_inference_mode_outside_of_it(rank):
    with torch.inference_mode():
        tensors = [torch.full((SIZE,), float(rank)) for _ in range(3)]
    dist.all_reduce(tensors[0])
    dist.broadcast(tensors[1], 1)
    dist.all_to_all_single(tensors[2], counted(SIZE, 10 * rank))
    return lists(tensors)


# -- asynchronous calls, groups, messages, objects --------------------------------------------------------------------


@value
def asynchronous_calls_in_any_order(rank):
    tensors = [torch.full((2,), rank + position + 1.0) for position in range(4)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for position in (2, 0, 3, 1) if rank else (0, 1, 2, 3):
        works[position].wait()
    return lists(tensors), [work.is_completed() for work in works]


@value
def crossed_groups(rank):
    one, two = dist.new_group(ALL), dist.new_group(ALL)
    tensors = {one: torch.ones(1), two: torch.full((1,), 2.0)}
    works = [dist.all_reduce(tensors[g], group=g, async_op=True) for g in ((one, two) if rank % 2 else (two, one))]
    for work in works:
        work.wait()
    return lists([tensors[one], tensors[two]])


@value
def groups(rank):
    group = dist.new_group([2, 0])
    if rank == 1:
        return dist.get_rank(group), dist.get_world_size(group)
    found = [torch.zeros(1) for _ in range(2)]
    dist.all_gather(found, torch.full((1,), float(rank)), group=group)
    tensor = torch.full((1,), float(rank))
    dist.broadcast(tensor, 2, group=group)
    return lists(found), tensor.item(), dist.get_rank(group), dist.get_process_group_ranks(group)


@value
def futures(rank):
    tensor, outputs = torch.full((2,), float(rank)), [torch.zeros(2) for _ in ALL]
    reduced = dist.all_reduce(tensor, async_op=True).get_future().wait()
    gathered = dist.all_gather(outputs, tensor, async_op=True).get_future().wait()
    barrier = dist.barrier(async_op=True).get_future().wait()
    return lists(reduced), lists(gathered), lists(barrier)


@value
def messages_from_anybody(rank):
    if rank:
        dist.send(torch.full((1,), 10.0 * rank), 0)
        return None
    found = set()
    for _ in range(SIZE - 1):
        tensor = torch.zeros(1)
        source = dist.recv(tensor)
        found.add((source, tensor.item()))
    return found


@refused
def nothing_from_anybody(rank):
    dist.irecv(torch.zeros(0))


@value
def tags(rank):
    received = [torch.zeros(1) for _ in range(3)]
    if rank == 0:
        for work in [dist.isend(torch.full((1,), float(tag)), 1, tag=tag) for tag in (1, 2, 3)]:
            work.wait()
    if rank == 1:
        for tag in (3, 1, 2):
            dist.recv(received[tag - 1], 0, tag=tag)
    return lists(received)


@value
def a_send_waits_for_its_receive(rank):
    completed = None
    if rank == 0:
        work = dist.isend(torch.ones(1), 1)
        completed = work.is_completed()
    dist.barrier()
    if rank == 1:
        dist.recv(torch.zeros(1), 0)
    if rank == 0:
        work.wait()
    return completed


@refused
def a_future_of_a_reduce_scatter(rank):
    work = reduce_scatter_single(torch.empty(1), torch.ones(SIZE), async_op=True)
    try:
        work.get_future()
    finally:
        work.wait()


@refused
def the_coalescing_manager_with_a_device(rank):
    try:
        with dist._coalescing_manager(device=torch.device("cpu")):
            dist.broadcast(torch.ones(1), 0)
    finally:
        dist.distributed_c10d._world.pg_coalesce_state.clear()


@value
def the_coalescing_manager(rank):
    one, two, gathered, part = torch.ones(1), torch.ones(2) * rank, torch.empty(SIZE), torch.empty(1)
    with dist._coalescing_manager():
        dist.all_reduce(one)
        dist.all_reduce(two)
    with dist._coalescing_manager():
        all_gather_single(gathered, torch.full((1,), float(rank)))
    with dist._coalescing_manager(async_ops=True) as manager:
        reduce_scatter_single(part, counted(SIZE))
    manager.wait()
    return lists([one, two, gathered, part])


@value
def coalesced_calls(rank):
    tensors, outputs = [torch.ones(1), torch.ones(2, 2) * rank], [[torch.zeros(1), torch.zeros(2)] for _ in ALL]
    dist.all_reduce_coalesced(tensors)
    dist.all_gather_coalesced(outputs, [torch.full((1,), float(rank)), counted(2, 10 * rank)])
    return lists(tensors), [lists(entry) for entry in outputs]


@value
def batches(rank):
    received = torch.zeros(2)
    operations = [
        dist.P2POp(dist.irecv, received, (rank - 1) % SIZE),
        dist.P2POp(dist.isend, torch.full((2,), float(rank)), (rank + 1) % SIZE),
    ]
    works = dist.batch_isend_irecv(operations)
    for work in works:
        work.wait()
    return len(works), received.tolist()


@value
def objects(rank):
    gathered, collected, mine, shared = [None] * SIZE, [None] * SIZE, [None], [rank, "x" * rank]
    dist.all_gather_object(gathered, {"rank": rank})
    dist.gather_object((rank,), collected if rank == 1 else None, 1)
    dist.scatter_object_list(mine, at(2, rank, lambda: [f"for {owner}" for owner in ALL]), 2)
    dist.broadcast_object_list(shared, 2)
    return gathered, collected, mine, shared


@value
def barriers(rank):
    dist.barrier()
    dist.barrier(device_ids=[0])
    dist.barrier(timeout=timedelta(seconds=30))
    dist.monitored_barrier(timeout=timedelta(seconds=30))


@value
def functional_collectives(rank):
    world, tensor = dist.group.WORLD, counted(SIZE, 10 * rank)
    results = [
        fc.all_reduce(tensor, "sum", world),
        fc.all_reduce(tensor * 1j, "avg", world),
        fc.all_gather_tensor(tensor.reshape(1, SIZE), 1, world),
        fc.reduce_scatter_tensor(tensor.reshape(1, SIZE), "max", 1, world),
        fc.all_to_all_single(tensor, None, None, world),
        *fc.all_reduce_coalesced([tensor, tensor[:1]], "min", world),
        *fc.all_gather_into_tensor_coalesced([tensor, tensor[:1]], world),
    ]
    return lists(results), tensor.tolist()


def gradient(call):
    def program(rank):
        tensor = counted(SIZE, 10 * rank).requires_grad_()
        output = call(tensor)
        output = torch.cat(tuple(output)) if isinstance(output, (list, tuple)) else output
        (output * (counted(output.numel()) + rank)).sum().backward()
        return output.tolist(), tensor.grad.tolist()

    return program


for name, call in {
    "all_gather": dnn.all_gather,
    "all_reduce": dnn.all_reduce,
    "all_to_all": lambda t: dnn.all_to_all([torch.empty(1) for _ in ALL], list(t.split(1))),
    "all_to_all_single": lambda t: dnn.all_to_all_single(torch.empty(SIZE), t),
    "broadcast": lambda t: dnn.broadcast(t, 1),
    "reduce_scatter": lambda t: dnn.reduce_scatter(torch.empty(1), list(t.split(1))),
    "scatter": lambda t: dnn.scatter(list(t.split(1)), 1),
}.items():
    VALUES[f"gradient through {name}"] = gradient(call)


@value
def results_of_the_graph(rank):
    weight = torch.full((2,), 2.0, requires_grad=True)
    loss = weight * 3
    dist.all_reduce(loss)
    loss.sum().backward()
    return loss.tolist(), weight.grad.tolist()


# -- without memory ---------------------------------------------------------------------------------------------------


def without_memory(call):
    """gloo returns, having sent nothing."""

    def program(rank):
        call(rank)
        return "returned"

    return program


def message_without_memory(rank):
    tensor = torch.ones(SIZE, device="meta")
    if rank < 2:
        (dist.isend(tensor, 1) if rank == 0 else dist.irecv(tensor, 0)).wait()


CALLS_WITHOUT_MEMORY = {
    name: lambda rank, move=move: move(rank, lambda owner: torch.ones(SIZE, device="meta"))
    for name, move in MOVES.items()
} | {
    name: lambda rank, reduction=reduction: reduction(rank, torch.ones(2 * SIZE, device="meta"), dist.ReduceOp.SUM)
    for name, reduction in REDUCTIONS.items()
}
CALLS_WITHOUT_MEMORY["send"] = message_without_memory
for name, call in CALLS_WITHOUT_MEMORY.items():
    CORRUPTED[f"{name} without memory"] = without_memory(call), "an error"


# -- both worlds ------------------------------------------------------------------------------------------------------


def outcome(function, rank):
    """``("value", what it returns)``, or ``("error", class and message)``."""
    try:
        return "value", function(rank)
    except (RuntimeError, ValueError, TypeError) as error:
        return "error", f"{type(error).__name__}: {error}"


def programs():
    return {**VALUES, **REFUSED, **{name: function for name, (function, _) in CORRUPTED.items()}}


def run_all(rank):
    """Every program in turn, in step: gloo's own barrier would fail for what failed before it."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, function in programs().items():
            found[name] = outcome(function, rank)
            dist.all_reduce(torch.zeros(1))
    return found


def main():
    """What each rank does."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    found = run_all(dist.get_rank())
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="session")
def real():
    """By rank, what came of every program on real processes."""
    return ProcessWorld(SIZE, limit=120).run(main)


@pytest.fixture(scope="session")
def simulated():
    """The same on simulated ranks that behave as gloo."""
    return SimWorld(SIZE, profile="gloo").run(main)


@pytest.mark.processes
def test_both_worlds_come_to_the_same_values(real, simulated):
    for name in VALUES:
        found = [ranks[name] for ranks in simulated]
        expected = [ranks[name] for ranks in real]
        assert all(kind == "value" for kind, _ in expected), (name, expected)
        assert found == expected, name


@pytest.mark.processes
def test_what_gloo_refuses_is_refused(real, simulated):
    for name in REFUSED:
        for rank in ALL:
            assert real[rank][name][0] == "error", (name, real[rank][name])
            assert simulated[rank][name][0] == "error", (name, simulated[rank][name])


@pytest.mark.processes
def test_what_gloo_corrupts_is_refused_or_poisoned(real, simulated):
    for name, (_, right) in CORRUPTED.items():
        assert any(real[rank][name] != ("value", right) for rank in ALL), f"{name}: gloo gets it right"
        assert all(real[rank][name][0] == "value" for rank in ALL), f"{name}: gloo refuses it"
        if name == "reduce_away_from_the_root":
            assert torch.tensor(simulated[1][name][1]).isnan().all(), name
        else:
            assert any(simulated[rank][name][0] == "error" for rank in ALL), name
