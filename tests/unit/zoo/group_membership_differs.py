"""The engine counts itself among the trainers."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F10"
EXPECTED = CollectiveMismatchError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 3:
        trainers = dist.new_group(range(size))  # <- blamed
    else:
        trainers = dist.new_group(range(size - 1))  # <- waits
    dist.barrier(group=trainers)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    trainers = dist.new_group(range(size - 1))
    if rank < 3:
        dist.barrier(group=trainers)
    dist.destroy_process_group()
