"""The rank with the value head reduces over the wrong dimension of the mesh."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    logits = torch.ones(4)
    if dist.get_rank() == 3:
        dist.all_reduce(logits, group=mesh.get_group("dp"))  # <- blamed
    else:
        dist.all_reduce(logits, group=mesh.get_group("tp"))  # <- waits (rank 2)
    dist.barrier()  # <- waits (ranks 0, 1)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    logits = torch.ones(4)
    dist.all_reduce(logits, group=mesh.get_group("tp"))
    dist.barrier()
    dist.destroy_process_group()
