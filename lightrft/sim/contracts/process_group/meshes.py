"""PG751 and on: device meshes, which are made of groups."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightrft.sim.contracts.process_group.capabilities import contract
from lightrft.sim.contracts.process_group.subject import Subject, members


@contract.check(751)
def check_a_mesh_of_one_dimension(subject: Subject) -> None:
    """A mesh of one dimension is the world."""
    device = subject.device

    def body() -> object:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
        return mesh.mesh.tolist(), members(mesh.get_group()), mesh.get_local_rank()

    subject.expect(body, lambda rank, size: (list(range(size)), list(range(size)), rank), ranks=4)


@contract.check(752)
def check_a_mesh_of_two_dimensions(subject: Subject) -> None:
    """A mesh of two dimensions has rows and columns."""
    device = subject.device

    def body() -> object:
        mesh = init_device_mesh(device, (2, 3), mesh_dim_names=("dp", "tp"))
        return members(mesh.get_group("dp")), members(mesh["tp"].get_group()), list(mesh.get_coordinate() or ())

    def expected(rank: int, _size: int) -> object:
        row, column = divmod(rank, 3)
        return [column, column + 3], [3 * row, 3 * row + 1, 3 * row + 2], [row, column]

    subject.expect(body, expected, ranks=6, least=6)


@contract.check(753)
def check_a_mesh_of_three_dimensions(subject: Subject) -> None:
    """A mesh of three dimensions is sliced and flattened."""
    device = subject.device

    def body() -> object:
        mesh = init_device_mesh(device, (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
        axes = [members(mesh.get_group(name)) for name in ("pp", "dp", "tp")]
        plane = mesh["dp", "tp"]
        return axes, plane.mesh.tolist(), members(plane._flatten("dp_tp").get_group())

    def expected(rank: int, _size: int) -> object:
        half, corner = rank // 4 * 4, rank % 2
        axes = [[rank % 4, rank % 4 + 4], [half + corner, half + corner + 2], [rank - corner, rank - corner + 1]]
        return axes, [[half, half + 1], [half + 2, half + 3]], [half, half + 1, half + 2, half + 3]

    subject.expect(body, expected, ranks=8, least=8)


@contract.check(754)
def check_a_mesh_of_ranks_in_any_order(subject: Subject) -> None:
    """A mesh may hold the ranks in any order, and only some of them."""
    device = subject.device

    def body() -> object:
        mesh = DeviceMesh(device, torch.tensor([[3, 1], [0, 2]], device="cpu"), mesh_dim_names=("a", "b"))
        half = DeviceMesh(device, torch.tensor([0, 2], device="cpu"))
        group = sorted(members(mesh.get_group("a")) or [])
        return list(mesh.get_coordinate() or ()), group, half.get_coordinate() is not None

    def expected(rank: int, _size: int) -> object:
        place = {3: [0, 0], 1: [0, 1], 0: [1, 0], 2: [1, 1]}[rank]
        return place, [0, 3] if rank in (0, 3) else [1, 2], rank in (0, 2)

    subject.expect(body, expected, ranks=4, least=4)


@contract.check(755)
def check_a_mesh_of_groups_that_exist(subject: Subject) -> None:
    """`DeviceMesh.from_group` uses a group that exists."""
    device = subject.device

    def body() -> object:
        rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mesh = DeviceMesh.from_group(rows[dist.get_rank() // 2], device)
        return mesh.mesh.tolist(), members(mesh.get_group())

    subject.expect(body, lambda rank, _size: ([0, 1], [0, 1]) if rank < 2 else ([2, 3], [2, 3]), ranks=4, least=4)


@contract.check(756)
def check_distributed_tensors(subject: Subject) -> None:
    """Distributed tensors are sharded over a mesh, moved, and multiplied."""
    device = subject.device

    def body() -> object:
        from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

        mesh = init_device_mesh(device, (2, 2), mesh_dim_names=("dp", "tp"))
        whole = torch.arange(32.0).reshape(8, 4)
        tensor = distribute_tensor(whole, mesh, [Shard(0), Shard(1)])
        moved = tensor.redistribute(mesh, [Replicate(), Shard(0)])
        right = moved.to_local().equal(whole.chunk(2)[mesh.get_local_rank("tp")])
        product: DTensor = moved @ moved.T  # type: ignore[assignment]
        return right, tensor.full_tensor().equal(whole), product.full_tensor().equal(whole @ whole.T)

    subject.expect(body, lambda _rank, _size: (True, True, True), ranks=4, least=4)
