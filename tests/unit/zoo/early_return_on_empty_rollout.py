"""A rank whose rollout is empty returns before the second reduction."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (1,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rewards = torch.zeros(0) if dist.get_rank() == 1 else torch.ones(4)
    count = torch.tensor(rewards.numel())
    dist.all_reduce(count)  # <- blamed
    if rewards.numel() == 0:
        return  # the others still need this rank for the mean
    mean = rewards.sum() / count
    dist.all_reduce(mean)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rewards = torch.zeros(0) if dist.get_rank() == 1 else torch.ones(4)
    count = torch.tensor(rewards.numel())
    dist.all_reduce(count)
    mean = rewards.sum() / count
    dist.all_reduce(mean)
    assert mean == 1
    dist.destroy_process_group()
