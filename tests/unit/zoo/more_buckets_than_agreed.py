"""Rank 0 sends one bucket more than the engine was told to expect."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F09"
EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4
PARAMETERS = [5, 5, 3]


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    buckets = sum(PARAMETERS) // 5  # rounds down: the last bucket is not full
    if rank == 0:
        for bucket in torch.ones(sum(PARAMETERS)).split(5):
            dist.send(bucket, 3)  # <- blamed
    elif rank == 3:
        for _ in range(buckets):
            dist.recv(torch.empty(5), 0)
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    sizes = [bucket.numel() for bucket in torch.empty(sum(PARAMETERS)).split(5)]
    if rank == 0:
        for bucket in torch.ones(sum(PARAMETERS)).split(sizes):
            dist.send(bucket, 3)
    elif rank == 3:
        for size in sizes:
            dist.recv(torch.empty(size), 0)
    dist.barrier()
    dist.destroy_process_group()
