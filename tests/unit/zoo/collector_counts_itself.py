"""Rank 0 collects the results of its workers from any source, and counts itself among the workers."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F09"
EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    reward = torch.tensor([float(rank)])
    if rank == 0:
        for _ in range(size):
            dist.recv(reward)  # <- blamed
    else:
        dist.send(reward, 0)
    dist.destroy_process_group()  # <- waits


def mended():
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    reward = torch.tensor([float(rank)])
    if rank == 0:
        for _ in range(size - 1):
            dist.recv(reward)
    else:
        dist.send(reward, 0)
    dist.destroy_process_group()
