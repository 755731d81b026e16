"""Groups: who is in them, what they are called, how they end; and device meshes, which are made of them."""

import inspect
import os
import time
from datetime import timedelta
from functools import partial

import pytest
import simulated_ranks
import torch
import torch.distributed as dist
from simulated_ranks import all_gather_single
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightrft.errors import (
    CollectiveMismatchError,
    CollectiveTimeoutError,
    DeadlockError,
    RankFailedError,
    RefusedError,
)
from lightrft.sim import SimWorld

on_ranks = partial(simulated_ranks.on_ranks, backend="nccl")


def members(group):
    """The global ranks of a group's members, as a collective on the group finds them; None outside."""
    if group is dist.GroupMember.NON_GROUP_MEMBER or group is None:
        return None
    found = torch.empty(dist.get_world_size(group), dtype=torch.int64)
    all_gather_single(found, torch.tensor([dist.get_rank()]), group=group)
    return found.tolist()


# -- the default group ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["nccl", "gloo", "cpu:gloo,cuda:nccl", None])
def test_a_group_says_what_it_was_made_with(backend):
    def body():
        group = dist.group.WORLD
        devices = {device.type for device in group._device_types}
        assert group.rank() == dist.get_rank()
        assert group.size() == dist.get_world_size() == 3
        assert group.group_name == "0"
        assert group.group_desc == "default_pg"
        assert "simulated" in repr(group)
        assert c10d._get_pg_config(group)["ranks"] == [0, 1, 2] or c10d._get_pg_config(group)["group_size"] == 3
        assert dist.get_pg_count() == 1
        return dist.get_backend(), devices

    names = {"nccl": ("nccl", {"cuda"}), "gloo": ("gloo", {"cpu", "cuda"}), None: ("undefined", {"cpu", "cuda"})}
    assert on_ranks(3, body, backend=backend) == [names.get(backend, (backend, {"cpu", "cuda"}))] * 3


def test_an_unknown_backend_is_refused():
    with pytest.raises(RankFailedError, match="simulated ranks know nccl, gloo and pairs"):
        SimWorld(2).run(lambda: dist.init_process_group("mpi"))


@pytest.mark.parametrize("method", ["env://", "tcp://127.0.0.1:23456", "file:///tmp/of-a-simulated-run"])
def test_every_way_to_meet_works(method):
    def main():
        explicit = {} if method == "env://" else {"rank": int(os.environ["RANK"]), "world_size": 3}
        dist.init_process_group("gloo", init_method=method, **explicit)
        found = members(dist.group.WORLD)
        dist.destroy_process_group()
        return found

    assert SimWorld(3).run(main) == [[0, 1, 2]] * 3


def test_a_store_of_ones_own_will_do():
    def main():
        rank = int(os.environ["RANK"])
        store = dist.TCPStore("127.0.0.1", 29700, 2, is_master=rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        found = members(None) or members(dist.group.WORLD)
        dist.destroy_process_group()
        return found

    assert SimWorld(2).run(main) == [[0, 1]] * 2


def test_a_group_may_be_destroyed_and_made_again():
    def main():
        found = []
        for backend in ("gloo", "nccl", "gloo"):
            dist.init_process_group(backend)
            group = dist.new_group([0, 2])
            found.append((members(dist.group.WORLD), members(group), dist.get_backend()))
            dist.destroy_process_group()
            assert not dist.is_initialized()
        return found

    results = SimWorld(3).run(main)
    assert results[0] == [([0, 1, 2], [0, 2], backend) for backend in ("gloo", "nccl", "gloo")]
    assert results[1][0][1] is None


def test_one_group_may_be_destroyed_while_others_stay():
    def body():
        one, two = dist.new_group([0, 1]), dist.new_group([1, 2])
        dist.destroy_process_group(one)
        again = dist.new_group([0, 1])
        return members(two), members(again)

    assert on_ranks(3, body) == [(None, [0, 1]), ([1, 2], [0, 1]), ([1, 2], None)]


def test_a_group_takes_no_call_after_its_end():
    def body():
        group = dist.new_group([0, 1])
        dist.destroy_process_group(group)
        group.barrier()

    with pytest.raises(RankFailedError, match="barrier: the process group has been destroyed") as caught:
        on_ranks(2, body)
    assert isinstance(caught.value.__cause__, RefusedError)


def test_what_a_group_needs_of_the_nccl_build_is_there():
    def body():
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options.config.cga_cluster_size = 2
        group = dist.new_group([0, 1], pg_options=options)
        c10d._add_ephemeral_timeout_for_all_pgs(timedelta(seconds=5))
        assert c10d._get_process_group_uid(group) == -1 or True
        return members(group), options.is_high_priority_stream

    assert on_ranks(2, body) == [([0, 1], True)] * 2
    assert not hasattr(c10d, "ProcessGroupNCCL") or torch.cuda.is_available()


def test_the_timeout_of_a_group_may_be_changed():
    def body():
        c10d._set_pg_timeout(timedelta(seconds=5))
        if dist.get_rank() == 0:
            time.sleep(6)
        dist.barrier()

    with pytest.raises(CollectiveTimeoutError, match="the timeout of the group is 5000 ms"):
        on_ranks(3, body)


# -- sub-groups -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [[0], [3], [1, 4], [0, 1, 2, 3, 4], [0, 2, 3]], ids=str)
def test_a_group_may_hold_any_ranks(ranks):
    def body():
        group = dist.new_group(ranks)
        inside = dist.get_rank() in ranks
        assert (group is dist.GroupMember.NON_GROUP_MEMBER) == (not inside)
        assert dist.get_rank(group) == (ranks.index(dist.get_rank()) if inside else -1)
        assert dist.get_world_size(group) == (len(ranks) if inside else -1)
        if inside:
            assert dist.get_process_group_ranks(group) == ranks
            assert [dist.get_global_rank(group, position) for position in range(len(ranks))] == ranks
            assert [dist.get_group_rank(group, rank) for rank in ranks] == list(range(len(ranks)))
        return members(group)

    results = on_ranks(5, body)
    assert results == [ranks if rank in ranks else None for rank in range(5)]


def test_ranks_are_sorted_as_torch_sorts_them():
    def body():
        group = dist.new_group([3, 0, 2])
        return members(group), dist.get_rank(group)

    results = on_ranks(4, body)
    assert [results[rank] for rank in (0, 2, 3)] == [([0, 2, 3], 0), ([0, 2, 3], 1), ([0, 2, 3], 2)]


@pytest.mark.skipif("sort_ranks" not in inspect.signature(dist.new_group).parameters, reason="torch 2.13 and newer")
def test_a_group_may_have_an_order_of_its_own():
    def body():
        group = dist.new_group([3, 0, 2], sort_ranks=False)
        if dist.get_rank() == 1:
            return None
        tensor = torch.tensor([float(dist.get_rank())])
        dist.broadcast(tensor, 3, group=group)
        parts = [torch.tensor([float(value)]) for value in (10, 11, 12)] if dist.get_rank() == 0 else None
        mine = torch.empty(1)
        dist.scatter(mine, parts, src=0, group=group)
        return members(group), dist.get_rank(group), tensor.item(), mine.item()

    results = on_ranks(4, body)
    assert results[3] == ([3, 0, 2], 0, 3, 10)
    assert results[0] == ([3, 0, 2], 1, 3, 11)
    assert results[2] == ([3, 0, 2], 2, 3, 12)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([0, 0], "duplicate|unique"),
        ([0, 9], "out of range|must be part of"),
        ([0, 1, 2, 3], "should be less or equal to the world size"),
    ],
    ids=str,
)
def test_impossible_ranks_are_refused_by_torch(ranks, message):
    with pytest.raises(RankFailedError, match=message):
        on_ranks(2, lambda: dist.new_group(ranks))


def test_calls_of_ranks_outside_the_group_do_nothing():
    def body():
        group = dist.new_group([0, 1])
        if dist.get_rank() == 2:
            with pytest.warns(UserWarning, match="does not belong to"):
                dist.all_reduce(torch.ones(1), group=group)
            return None
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group)
        return tensor.item()

    assert on_ranks(3, body) == [2, 2, None]


def test_several_groups_of_the_same_ranks_are_different_groups():
    def body():
        groups = [dist.new_group([0, 1]) for _ in range(3)]
        assert len({group.group_name for group in groups}) == 3
        tensors = [torch.ones(1) for _ in groups]
        works = [dist.all_reduce(t, group=g, async_op=True) for t, g in zip(tensors, groups, strict=True)]
        for work in reversed(works):
            work.wait()
        return [tensor.item() for tensor in tensors]

    assert on_ranks(2, body) == [[2, 2, 2]] * 2


def test_members_alone_may_make_a_group():
    def body():
        pair = [0, 1] if dist.get_rank() < 2 else [2, 3]
        found = [members(dist.new_group(pair, use_local_synchronization=True)) for _ in range(2)]
        found.append(members(dist.new_group([0, 3])))
        if dist.get_rank() in (1, 2):
            found.append(members(dist.new_group([1, 2], use_local_synchronization=True)))
        return found

    for seed in range(4):
        results = on_ranks(4, body, schedule="random", seed=seed)
        assert results[0] == [[0, 1], [0, 1], [0, 3]]
        assert results[1] == [[0, 1], [0, 1], None, [1, 2]]
        assert results[2] == [[2, 3], [2, 3], None, [1, 2]]
        assert results[3] == [[2, 3], [2, 3], [0, 3]]


def test_members_that_have_different_numbers_of_groups_do_not_find_each_other_as_in_torch():
    def body():
        if dist.get_rank() == 0:
            dist.new_group([0], use_local_synchronization=True)
        members(dist.new_group([0, 1], use_local_synchronization=True))

    with pytest.raises(DeadlockError):
        on_ranks(2, body)


def test_new_subgroups_cuts_the_world_into_equal_parts():
    def body():
        mine, groups = dist.new_subgroups(group_size=2)
        return members(mine), len(groups)

    assert on_ranks(6, body) == [([rank // 2 * 2, rank // 2 * 2 + 1], 3) for rank in range(6)]


def test_new_subgroups_takes_a_node_by_default_where_there_is_cuda():
    def body():
        mine, groups = dist.new_subgroups()
        return members(mine), len(groups)

    results = on_ranks(6, body, cuda=True, gpus_per_node=3)
    assert results == [([0, 1, 2], 2)] * 3 + [([3, 4, 5], 2)] * 3


def test_new_subgroups_by_enumeration_takes_any_disjoint_lists():
    def body():
        mine, groups = dist.new_subgroups_by_enumeration([[0, 4], [1, 2]])
        return members(mine), len(groups)

    results = on_ranks(5, body)
    assert [result[0] for result in results] == [[0, 4], [1, 2], [1, 2], None, [0, 4]]


def test_groups_of_groups_may_be_made_in_any_shape_for_every_seed():
    def body():
        rank = dist.get_rank()
        rows = [dist.new_group([0, 1, 2]), dist.new_group([3, 4, 5])]
        columns = [dist.new_group([column, column + 3]) for column in range(3)]
        row, column = rows[rank // 3], columns[rank % 3]
        tensor = torch.tensor([float(rank)])
        dist.all_reduce(tensor, group=row)
        dist.all_reduce(tensor, group=column)
        return tensor.item()

    for seed in range(5):
        assert on_ranks(6, body, schedule="random", seed=seed) == [15.0] * 6


# -- splitting --------------------------------------------------------------------------------------------------------


def split_ranks_of(parts, size=6, backend="nccl", parent=None, device=0):
    def main():
        dist.init_process_group(backend, device_id=None if device is None else torch.device("cuda", device))
        group = dist.new_group(parent) if parent else None
        found = None
        if not parent or dist.get_rank() in parent:
            mine = dist.split_group(group, parts)
            found = (members(mine), mine and mine.group_desc)
            if mine is not None:
                assert dist.get_process_group_ranks(mine) == found[0]
                assert dist.get_rank(mine) == found[0].index(dist.get_rank())
                assert dist.get_global_rank(mine, 0) == found[0][0]
        dist.destroy_process_group()
        return found

    return SimWorld(size).run(main)


def test_split_group_gives_each_rank_its_part():
    results = split_ranks_of([[0, 1, 2], [4, 3]])
    assert [found for found, _ in results] == [[0, 1, 2]] * 3 + [[3, 4]] * 2 + [None]
    assert "split" in results[0][1]


def test_split_ranks_are_ranks_of_the_parent():
    results = split_ranks_of([[0, 2], [1]], parent=[1, 3, 5])
    assert results == [None, ([1, 5], results[1][1]), None, ([3], results[3][1]), None, ([1, 5], results[5][1])]


def test_a_group_may_be_split_again():
    def main():
        dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
        half = dist.split_group(split_ranks=[[0, 1], [2, 3]])
        alone = dist.split_group(half, [[0], [1]])
        again = dist.split_group(split_ranks=[[0, 1], [2, 3]])
        found = members(half), members(alone), members(again)
        dist.destroy_process_group()
        return found

    assert SimWorld(4).run(main)[3] == ([2, 3], [3], [2, 3])


def test_split_group_needs_a_device_and_nccl_as_in_torch():
    with pytest.raises(RankFailedError, match=r"bound to no device; call init_process_group\(device_id="):
        split_ranks_of([[0, 1]], size=2, device=None)
    with pytest.raises(RankFailedError, match="split_group is not supported by gloo"):
        split_ranks_of([[0, 1]], size=2, backend="gloo")


@pytest.mark.parametrize("parts", [[], [[]], [[0, 0]], [[0, 7]], [[0, 1, 0]]], ids=str)
def test_an_impossible_split_is_refused(parts):
    with pytest.raises(RankFailedError, match="ValueError"):
        split_ranks_of(parts, size=2)


def test_ranks_must_agree_how_to_split():
    def main():
        dist.init_process_group("nccl", device_id=torch.device("cuda", 0))
        dist.split_group(split_ranks=[[0, 1], [2, 3]] if dist.get_rank() else [[0, 2], [1, 3]])

    with pytest.raises(CollectiveMismatchError, match="split_group"):
        SimWorld(4).run(main)


# -- device meshes ----------------------------------------------------------------------------------------------------

every_device = pytest.mark.parametrize("device", ["cpu", "cuda"])
every_world = pytest.mark.parametrize("cuda", [False, True], ids=["", "cuda is available"])


@every_device
@every_world
def test_a_mesh_of_one_dimension_is_the_world(device, cuda):
    def body():
        mesh = init_device_mesh(device, (4,))
        return mesh.mesh.tolist(), members(mesh.get_group()), mesh.get_local_rank(), mesh.size()

    results = on_ranks(4, body, backend="cpu:gloo,cuda:nccl", cuda=cuda)
    assert results == [([0, 1, 2, 3], [0, 1, 2, 3], rank, 4) for rank in range(4)]


@every_device
@every_world
def test_a_mesh_of_two_dimensions_has_rows_and_columns(device, cuda):
    def body():
        mesh = init_device_mesh(device, (2, 3), mesh_dim_names=("dp", "tp"))
        rank = dist.get_rank()
        assert mesh.get_coordinate() in ([rank // 3, rank % 3], (rank // 3, rank % 3))
        assert mesh["tp"].mesh.tolist() == members(mesh.get_group("tp"))
        return members(mesh.get_group("dp")), members(mesh["tp"].get_group()), mesh.get_local_rank("tp")

    results = on_ranks(6, body, backend="cpu:gloo,cuda:nccl", cuda=cuda)
    assert results == [([r % 3, r % 3 + 3], [r // 3 * 3 + c for c in range(3)], r % 3) for r in range(6)]


@every_device
@every_world
def test_a_mesh_of_three_dimensions_is_sliced_and_flattened(device, cuda):
    def body():
        mesh = init_device_mesh(device, (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
        plane = mesh["dp", "tp"]
        flat = plane._flatten("dp_tp")
        other = mesh["pp", "dp"]._flatten()
        return (
            [members(mesh.get_group(name)) for name in ("pp", "dp", "tp")],
            plane.mesh.tolist(),
            members(flat.get_group()),
            members(other.get_group()),
        )

    for rank, (axes, plane, flat, other) in enumerate(on_ranks(8, body, backend="cpu:gloo,cuda:nccl", cuda=cuda)):
        half, corner = rank // 4 * 4, rank % 2
        assert axes == [
            [rank % 4, rank % 4 + 4],
            [half + corner, half + corner + 2],
            [rank - corner, rank - corner + 1],
        ]
        assert plane == [[half, half + 1], [half + 2, half + 3]]
        assert flat == [half, half + 1, half + 2, half + 3]
        assert other == [corner, corner + 2, corner + 4, corner + 6]


def test_a_mesh_makes_the_default_group_if_there_is_none():
    def main():
        mesh = init_device_mesh("cpu", (2, 2))
        found = members(mesh.get_group(1))
        dist.destroy_process_group()
        return found

    assert SimWorld(4).run(main) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_a_mesh_may_be_bound_to_devices():
    def main():
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl", device_id=local)
        mesh = init_device_mesh("cuda", (2, 2), mesh_dim_names=("dp", "tp"))
        found = members(mesh.get_group("dp")), members(mesh.get_group("tp"))
        dist.destroy_process_group()
        return found

    for cuda in (False, True):
        results = SimWorld(4, cuda=cuda).run(main)
        assert results == [([0, 2], [0, 1]), ([1, 3], [0, 1]), ([0, 2], [2, 3]), ([1, 3], [2, 3])]


def test_a_mesh_may_hold_some_of_the_ranks_in_any_order():
    def body():
        mesh = DeviceMesh("cpu", [[3, 1], [0, 2]], mesh_dim_names=("a", "b"))
        half = DeviceMesh("cpu", [0, 2])
        coordinate = mesh.get_coordinate()
        return list(coordinate), sorted(members(mesh.get_group("a"))), half.get_coordinate() is not None

    results = on_ranks(4, body, backend="gloo")
    assert results == [([1, 0], [0, 3], True), ([0, 1], [1, 2], False), ([1, 1], [1, 2], True), ([0, 0], [0, 3], False)]


def test_a_mesh_is_made_of_groups_that_exist():
    def body():
        group = dist.new_group([0, 1]) if dist.get_rank() < 2 else None
        other = dist.new_group([0, 1])
        rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mesh = DeviceMesh.from_group(rows[dist.get_rank() // 2], "cpu")
        del group, other
        return mesh.mesh.tolist(), members(mesh.get_group())

    def fixed():
        rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mesh = DeviceMesh.from_group(rows[dist.get_rank() // 2], "cpu")
        return mesh.mesh.tolist(), members(mesh.get_group())

    assert on_ranks(4, fixed, backend="gloo") == [([0, 1], [0, 1])] * 2 + [([2, 3], [2, 3])] * 2
    with pytest.raises(CollectiveMismatchError, match="made different groups"):
        on_ranks(4, body, backend="gloo")


def test_meshes_of_other_shapes_are_a_mismatch():
    def body():
        init_device_mesh("cpu", (2, 4) if dist.get_rank() else (4, 2))

    with pytest.raises(CollectiveMismatchError):
        on_ranks(8, body, backend="gloo")


def test_distributed_tensors_travel_over_a_mesh():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    def body():
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        whole = torch.arange(32.0).reshape(8, 4)
        tensor = distribute_tensor(whole, mesh, [Shard(0), Shard(1)])
        moved = tensor.redistribute(mesh, [Replicate(), Shard(0)])
        assert tensor.to_local().shape == (4, 2)
        assert moved.to_local().equal(whole.chunk(2)[mesh.get_local_rank("tp")])
        return (moved @ moved.T).full_tensor().equal(whole @ whole.T)

    assert on_ranks(4, body, backend="gloo") == [True] * 4
