"""A tensor without memory, on one rank or on all, in every collective and message."""

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import all_gather_single, reduce_scatter_single

from lightrft.errors import CollectiveMismatchError, RankFailedError, RefusedError
from lightrft.sim import SimWorld, process_group
from lightrft.sim.process_group import SimProcessGroup

SIZE = 3
SCHEDULES = [{}, *({"schedule": "random", "seed": seed} for seed in range(3))]


def on_ranks(body, size=SIZE, backend="gloo", **options):
    """Run ``body(rank)`` on ranks that have a group; what it returns, by rank."""

    def main():
        dist.init_process_group(backend)
        result = body(dist.get_rank())
        dist.destroy_process_group()
        return result

    return SimWorld(size, strict=True, **options).run(main)


def some(device, *shape):
    return torch.ones(shape or (4,), device=device)


def parts(device):
    return [some(device) for _ in range(SIZE)]


def group():
    return dist.distributed_c10d._get_default_group()


def coalesced(device):
    with dist._coalescing_manager():
        dist.all_reduce(some(device))


COLLECTIVES = {
    "all_reduce": lambda rank, d: dist.all_reduce(some(d)),
    "all_reduce, asynchronous": lambda rank, d: dist.all_reduce(some(d), async_op=True).wait(),
    "all_reduce in a coalescing manager": lambda rank, d: coalesced(d),
    "all_reduce_coalesced": lambda rank, d: group().allreduce_coalesced([some("cpu"), some(d)]).wait(),
    "broadcast": lambda rank, d: dist.broadcast(some(d), 0),
    "reduce": lambda rank, d: dist.reduce(some(d), 0),
    "all_gather": lambda rank, d: dist.all_gather(parts(d), some(d)),
    "all_gather, its input": lambda rank, d: dist.all_gather(parts("cpu"), some(d)),
    "all_gather, an output": lambda rank, d: dist.all_gather([some(d), *parts("cpu")[1:]], some("cpu")),
    "all_gather_coalesced": lambda rank, d: group().allgather_coalesced([[some(d)]] * SIZE, [some(d)]).wait(),
    "all_gather_single": lambda rank, d: all_gather_single(some("cpu", 4 * SIZE), some(d)),
    "all_gather_single_coalesced": lambda rank, d: (
        group().all_gather_single_coalesced([some(d, 4 * SIZE)], [some(d)]).wait()
    ),
    "gather": lambda rank, d: dist.gather(some(d), parts(d) if rank == 0 else None, 0),
    "scatter": lambda rank, d: dist.scatter(some(d), parts(d) if rank == 0 else None, 0),
    "reduce_scatter": lambda rank, d: dist.reduce_scatter(some(d), parts(d)),
    "reduce_scatter_single": lambda rank, d: reduce_scatter_single(some(d), some("cpu", 4 * SIZE)),
    "reduce_scatter_single_coalesced": lambda rank, d: (
        group().reduce_scatter_single_coalesced([some(d)], [some(d, 4 * SIZE)]).wait()
    ),
    "all_to_all": lambda rank, d: dist.all_to_all(parts(d), parts(d)),
    "all_to_all_single": lambda rank, d: dist.all_to_all_single(some(d, SIZE), some("cpu", SIZE)),
}

every_collective = pytest.mark.parametrize("name", COLLECTIVES)


def blamed(error):
    return [culprit.rank for culprit in error.report.culprits]


def told_apart(error):
    """What the table of the report says of each rank."""
    return {rank: row.what for row in error.report.difference for rank in row.ranks}


def test_the_table_has_every_collective_that_torch_calls():
    public = {name.replace("_", "") for name, method in vars(SimProcessGroup).items() if callable(method)}
    tested = {name.partition(",")[0].partition(" in ")[0].replace("_", "") for name in COLLECTIVES}
    older_names = {name.replace("_", "") for name in process_group._OLDER_NAMES}
    others = {"barrier", "monitoredbarrier", "send", "recv", "recvanysource", "meetsplit"} | older_names
    private = {name.replace("_", "") for name in vars(SimProcessGroup) if name.startswith("_")}
    assert tested == public - others - private


@every_collective
def test_who_hands_in_a_tensor_without_memory_is_named_with_the_devices_of_all(name):
    for odd in range(SIZE):
        for options in SCHEDULES:
            with pytest.raises(CollectiveMismatchError, match="the device differs between ranks") as caught:
                on_ranks(lambda rank, odd=odd: COLLECTIVES[name](rank, "meta" if rank == odd else "cpu"), **options)
            assert blamed(caught.value) == [odd]
            said = told_apart(caught.value)
            assert " on meta" in said.pop(odd)
            assert len(said) == SIZE - 1
            assert all(" on cpu" in what for what in said.values())


@every_collective
def test_a_majority_without_memory_is_no_better(name):
    with pytest.raises(CollectiveMismatchError) as caught:
        on_ranks(lambda rank: COLLECTIVES[name](rank, "cpu" if rank == 1 else "meta"), backend="cpu:gloo,cuda:nccl")
    assert blamed(caught.value) == [0, 2]


@every_collective
@pytest.mark.parametrize("profile", ["strict", "gloo"])
def test_a_tensor_without_memory_on_every_rank_is_refused_on_every_rank(name, profile):
    with pytest.raises(RankFailedError, match="a tensor on meta, which has no data") as caught:
        on_ranks(lambda rank: COLLECTIVES[name](rank, "meta"), profile=profile)
    assert isinstance(caught.value.__cause__, RefusedError)
    assert blamed(caught.value) == [0, 1, 2]


def test_a_refused_rank_may_go_on():
    def body(rank):
        with pytest.raises(RefusedError):
            dist.all_reduce(some("meta"))
        total = some("cpu")
        dist.all_reduce(total)
        return total.tolist()

    for options in SCHEDULES:
        assert on_ranks(body, **options) == [[3.0] * 4] * SIZE


def test_a_tensor_without_memory_is_refused_where_the_others_never_come():
    def body(rank):
        if rank == 1:
            dist.all_reduce(some("meta"))

    for options in SCHEDULES:
        with pytest.raises(RankFailedError, match="a tensor on meta") as caught:
            on_ranks(body, **options)
        assert blamed(caught.value) == [1]


def test_a_tensor_without_memory_in_crossed_groups_is_refused_and_no_deadlock():
    """The first rank may enter two groups at once, and so in another order than the second; to be compared it waits."""

    def body(rank, device="meta"):
        one, other = dist.new_group([0, 1]), dist.new_group([0, 1])
        if rank == 0:
            works = [dist.all_reduce(some(device), group=one, async_op=True)]
            works.append(dist.all_reduce(some("cpu"), group=other, async_op=True))
            for work in works:
                work.wait()
        else:
            dist.all_reduce(some("cpu"), group=other)
            dist.all_reduce(some("cpu"), group=one)

    for options in SCHEDULES:
        on_ranks(lambda rank: body(rank, "cpu"), 2, **options)
        with pytest.raises(RankFailedError, match="a tensor on meta") as caught:
            on_ranks(body, 2, **options)
        assert blamed(caught.value) == [0]


# -- messages ---------------------------------------------------------------------------------------------------------


def blocking(rank, sent, received):
    if rank == 0:
        dist.send(some(sent), 2)
    elif rank == 2:
        dist.recv(some(received), 0)


def from_anybody(rank, sent, received):
    if rank == 0:
        dist.send(some(sent), 2)
    elif rank == 2:
        dist.recv(some(received))


def in_a_batch(rank, sent, received):
    if rank == 0:
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, some(sent), 2)])
    elif rank == 2:
        works = dist.batch_isend_irecv([dist.P2POp(dist.irecv, some(received), 0)])
    else:
        return
    for work in works:
        work.wait()


every_message = pytest.mark.parametrize("exchange", [blocking, from_anybody, in_a_batch], ids=lambda f: f.__name__)


@every_message
@pytest.mark.parametrize(("sent", "received", "rank"), [("meta", "cpu", 0), ("cpu", "meta", 2)])
def test_the_end_of_a_message_without_memory_is_named(exchange, sent, received, rank):
    for options in SCHEDULES:
        with pytest.raises(CollectiveMismatchError, match=f"sent from {sent}, received on {received}") as caught:
            on_ranks(lambda own: exchange(own, sent, received), **options)
        assert blamed(caught.value) == [rank]
        assert set(told_apart(caught.value)) == {0, 2}


@every_message
def test_a_message_without_memory_at_both_ends_is_refused_at_both(exchange):
    for options in SCHEDULES:
        with pytest.raises(RankFailedError, match="a tensor on meta") as caught:
            on_ranks(lambda own: exchange(own, "meta", "meta"), **options)
        assert blamed(caught.value) == [0, 2]


def test_a_functional_collective_of_a_tensor_without_memory_asks_nobody():
    """torch answers it itself, on a cluster too: tracing relies on it."""
    import torch.distributed._functional_collectives as fc

    def body(rank):
        return str(fc.wait_tensor(fc.all_reduce(some("meta"), "sum", group())).device)

    assert on_ranks(body) == ["meta"] * SIZE
