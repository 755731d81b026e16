"""The reward worker answers its neighbour instead of the rank that asked."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F09"
EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    rewards = torch.ones(8)
    if rank == 0:
        dist.recv(rewards, 3)  # <- waits (rank 0)
    elif rank == 3:
        dist.send(rewards, (rank + 2) % size)  # <- blamed
    dist.barrier()  # <- waits (ranks 1, 2)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    rewards = torch.ones(8)
    if rank == 0:
        dist.recv(rewards, 3)
    elif rank == 3:
        dist.send(rewards, 0)
    dist.barrier()
    dist.destroy_process_group()
