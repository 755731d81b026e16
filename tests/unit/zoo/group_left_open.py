"""Rank 0 returns its report without destroying the process group."""

import torch
import torch.distributed as dist

from lightrft.errors import UnfinishedError

EXPECTED = UnfinishedError
RANKS = (0,)
SIZE = 4
OPTIONS = {"strict": True}


def broken():
    dist.init_process_group("nccl")  # <- blamed
    reward = torch.ones(1)
    dist.all_reduce(reward)
    if dist.get_rank() == 0:
        return {"reward": reward.item()}
    dist.destroy_process_group()
    return {}


def mended():
    dist.init_process_group("nccl")
    rank, reward = dist.get_rank(), torch.ones(1)
    dist.all_reduce(reward)
    dist.destroy_process_group()
    return {"reward": reward.item()} if rank == 0 else {}
