"""Rank 0 writes the log, and what it logs is a reduction."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4


def mean_reward(rewards):
    mean = rewards.mean()
    dist.all_reduce(mean, op=dist.ReduceOp.AVG)  # <- blamed
    return mean.item()


def broken():
    dist.init_process_group("nccl")
    log = []
    rewards = torch.ones(4)
    dist.all_reduce(rewards)
    if dist.get_rank() == 0:
        log.append(mean_reward(rewards))
    dist.destroy_process_group()  # <- waits


def mended():
    dist.init_process_group("nccl")
    log = []
    rewards = torch.ones(4)
    dist.all_reduce(rewards)
    mean = mean_reward(rewards)
    if dist.get_rank() == 0:
        log.append(mean)
    dist.destroy_process_group()
