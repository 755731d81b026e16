"""The engine makes the group of the weight sync before the tensor-parallel groups."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F10"
EXPECTED = CollectiveMismatchError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    if dist.get_rank() == 3:
        sync = dist.new_group([0, 3])  # <- blamed
        dist.new_group([0, 1, 2])
    else:
        dist.new_group([0, 1, 2])  # <- waits
        sync = dist.new_group([0, 3])
    if dist.get_rank() in (0, 3):
        dist.broadcast(torch.ones(8), src=0, group=sync)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    dist.new_group([0, 1, 2])
    sync = dist.new_group([0, 3])
    if dist.get_rank() in (0, 3):
        dist.broadcast(torch.ones(8), src=0, group=sync)
    dist.destroy_process_group()
