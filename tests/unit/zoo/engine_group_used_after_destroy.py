"""Weights are synchronised once more after the group of the engine is gone."""

import torch
import torch.distributed as dist

from lightrft.errors import RankFailedError

ROW = "F10"
EXPECTED = RankFailedError
CAUSE = ValueError
RANKS = (0, 3)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    sync = dist.new_group([0, 3])
    if dist.get_rank() in (0, 3):
        dist.broadcast(torch.ones(8), src=0, group=sync)
        dist.destroy_process_group(sync)
        dist.broadcast(torch.ones(8), src=0, group=sync)  # <- blamed
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    sync = dist.new_group([0, 3])
    if dist.get_rank() in (0, 3):
        dist.broadcast(torch.ones(8), src=0, group=sync)
        dist.broadcast(torch.ones(8), src=0, group=sync)
        dist.destroy_process_group(sync)
    dist.barrier()
    dist.destroy_process_group()
