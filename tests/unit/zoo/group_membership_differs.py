"""The engine counts itself among the trainers."""

import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F10"
EXPECTED = CollectiveMismatchError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    members = range(size) if rank == 3 else range(size - 1)
    trainers = dist.new_group(members)  # <- blamed
    dist.barrier(group=trainers)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    members = range(size - 1)
    trainers = dist.new_group(members)
    if rank in members:
        dist.barrier(group=trainers)
    dist.destroy_process_group()
