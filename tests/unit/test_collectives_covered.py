"""Every public collective of torch works, or is refused and documented."""

import inspect
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from collective_values import MOVES, check_reductions, send_and_receive, values
from simulated_ranks import on_ranks
from torch.distributed import distributed_c10d as c10d

from lightrft.errors import RankFailedError
from lightrft.sim import SimWorld

DOCS = Path(__file__).parents[2] / "docs" / "process-group.md"


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
