"""One node was started with another tensor-parallel size."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (6, 7)
SIZE = 8
OPTIONS = {"gpus_per_node": 2}


def broken():
    dist.init_process_group("gloo")
    tensor_parallel = 4 if dist.get_rank() >= 6 else 2  # a stale launch script on the last node
    shape = (dist.get_world_size() // tensor_parallel, tensor_parallel)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))  # <- blamed
    dist.all_reduce(torch.ones(4), group=mesh.get_group("tp"))
    dist.destroy_process_group()


def mended():
    dist.init_process_group("gloo")
    tensor_parallel = torch.tensor(2)
    dist.broadcast(tensor_parallel, src=0)
    shape = (dist.get_world_size() // int(tensor_parallel), int(tensor_parallel))
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp"))
    dist.all_reduce(torch.ones(4), group=mesh.get_group("tp"))
    dist.destroy_process_group()
