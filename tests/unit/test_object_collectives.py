"""Collectives of Python objects, which torch builds from those of tensors."""

import pytest
import torch
import torch.distributed as dist
from simulated_ranks import on_ranks

from lightrft.errors import DeadlockError, RankFailedError, SimulationError


def thing(rank):
    """Objects of very different sizes and kinds."""
    return [None, {"rank": rank, "text": "x" * 5000}, (rank, [1.5, "two"]), torch.full((rank,), 7)][rank % 4]


def equal(left, right):
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


every_backend = pytest.mark.parametrize("backend", ["gloo", "nccl", "cpu:gloo,cuda:nccl"])


@every_backend
def test_all_gather_object_gives_everybody_everything_in_rank_order(backend):
    def body():
        size = dist.get_world_size()
        objects = [None] * size
        dist.all_gather_object(objects, thing(dist.get_rank()))
        assert all(equal(found, thing(rank)) for rank, found in enumerate(objects))

    on_ranks(6, body, backend=backend)


@every_backend
def test_gather_object_collects_at_the_root(backend):
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        objects = [None] * size if rank == 2 else None
        dist.gather_object(thing(rank), objects, dst=2)
        assert rank != 2 or all(equal(found, thing(owner)) for owner, found in enumerate(objects))

    on_ranks(5, body, backend=backend)


@every_backend
def test_broadcast_object_list_replaces_everybodys_objects(backend):
    def body():
        objects = [thing(1), "b", 3] if dist.get_rank() == 1 else [None] * 3
        dist.broadcast_object_list(objects, src=1)
        return objects

    assert on_ranks(3, body, backend=backend) == [[thing(1), "b", 3]] * 3


@every_backend
def test_scatter_object_list_gives_each_rank_its_own(backend):
    def body():
        rank, size = dist.get_rank(), dist.get_world_size()
        mine = [None]
        dist.scatter_object_list(mine, [thing(owner) for owner in range(size)] if rank == 1 else None, src=1)
        assert equal(mine[0], thing(rank))

    on_ranks(4, body, backend=backend)


@every_backend
@pytest.mark.parametrize("use_batch", [False, True])
def test_lists_of_objects_are_sent_and_received(backend, use_batch):
    def body():
        rank = dist.get_rank()
        if rank == 0:
            dist.send_object_list([thing(1), "second"], 2, use_batch=use_batch)
        if rank == 2:
            objects = [None, None]
            source = dist.recv_object_list(objects, 0, use_batch=use_batch)
            return source, objects
        return None

    assert on_ranks(3, body, backend=backend)[2] == (0, [thing(1), "second"])


def test_objects_travel_in_groups():
    def body():
        rank = dist.get_rank()
        group = dist.new_group([1, 3])
        if rank not in (1, 3):
            return None
        gathered, shared = [None, None], [rank]
        dist.all_gather_object(gathered, rank, group=group)
        dist.broadcast_object_list(shared, 3, group=group)
        return gathered, shared

    assert on_ranks(4, body)[1] == ([1, 3], [3])


def test_an_object_that_arrives_is_a_copy():
    def body():
        mine = {"rank": dist.get_rank(), "list": []}
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
        gathered[dist.get_rank()]["list"].append(1)
        return mine["list"], all(found["list"] == [] for found in gathered if found["rank"] != dist.get_rank())

    assert on_ranks(3, body) == [([], True)] * 3


def test_an_object_that_cannot_be_pickled_is_the_error_of_its_rank():
    def body():
        dist.all_gather_object([None] * 2, (lambda: None) if dist.get_rank() else "fine")

    with pytest.raises(RankFailedError, match="rank 1 failed") as caught:
        on_ranks(2, body)
    assert not isinstance(caught.value.__cause__, SimulationError)


def test_a_rank_that_leaves_objects_out_is_a_deadlock():
    def body():
        if dist.get_rank():
            dist.all_gather_object([None] * 3, "here")

    with pytest.raises(DeadlockError, match="all_gather"):
        on_ranks(3, body)


def test_objects_are_gathered_alike_for_every_schedule():
    def body():
        objects = [None] * 4
        for turn in range(3):
            dist.all_gather_object(objects, (turn, dist.get_rank()))
        return objects

    results = {repr(on_ranks(4, body, schedule="random", seed=seed)) for seed in range(5)}
    assert results == {repr([[(2, rank) for rank in range(4)]] * 4)}
