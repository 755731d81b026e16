"""A rank swallows the error of its reward function, and the gather behind it."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (1,)
SIZE = 4


def score(rank, step):
    if rank == 1 and step == 1:
        raise ValueError("no boxed answer")
    return torch.ones(4)


def broken():
    dist.init_process_group("nccl")
    failures = 0
    for step in range(2):
        try:
            rewards = score(dist.get_rank(), step)
            dist.all_reduce(rewards)  # <- waits
        except ValueError:  # the reduction is inside the try
            failures += 1
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("nccl")
    failures = 0
    for step in range(2):
        try:
            rewards = score(dist.get_rank(), step)
        except ValueError:
            rewards = torch.zeros(4)
            failures += 1
        dist.all_reduce(rewards)
    dist.destroy_process_group()
