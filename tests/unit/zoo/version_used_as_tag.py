"""The version travels as the tag of the message; the engine still counts from the last one."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F10"
EXPECTED = CollectiveMismatchError
RANKS = (0, 3)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank, weights = dist.get_rank(), torch.ones(16)
    trainer_version, engine_version = 2, 1
    if rank == 0:
        dist.send(weights, 3, tag=trainer_version)  # <- blamed (rank 0)
    elif rank == 3:
        dist.recv(weights, 0, tag=engine_version)  # <- blamed (rank 3)
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank, weights = dist.get_rank(), torch.ones(16)
    version = torch.tensor([2])
    dist.broadcast(version, src=0)
    if rank == 0:
        dist.send(weights, 3, tag=int(version))
    elif rank == 3:
        dist.recv(weights, 0, tag=int(version))
    dist.barrier()
    dist.destroy_process_group()
