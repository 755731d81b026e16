"""The engine leaves out a group that it is no member of; its next group then has another number than elsewhere."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F10"
EXPECTED = CollectiveMismatchError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    if rank < 3:
        dist.new_group([0, 1, 2])  # <- waits
    sync = dist.new_group([0, 3])  # <- blamed
    if rank in (0, 3):
        dist.broadcast(torch.ones(8), src=0, group=sync)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    dist.new_group([0, 1, 2])
    sync = dist.new_group([0, 3])
    if rank in (0, 3):
        dist.broadcast(torch.ones(8), src=0, group=sync)
    dist.destroy_process_group()
