"""A reward worker sends its score again after a time-out of its own, and nobody takes the second."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F09"
EXPECTED = DeadlockError
RANKS = (2,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank, score = dist.get_rank(), torch.ones(1)
    if rank == 0:
        for worker in (1, 2, 3):
            dist.recv(score, worker)
    else:
        for _ in range(2 if rank == 2 else 1):
            dist.send(score, 0)  # <- blamed
    dist.all_reduce(score)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank, score = dist.get_rank(), torch.ones(1)
    if rank == 0:
        for worker in (1, 2, 3):
            dist.recv(score, worker)
    else:
        dist.send(score, 0)
    dist.all_reduce(score)
    dist.destroy_process_group()
