"""A rank fails, and the barrier of its finally block hides the error."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
SAYS = "while handling ValueError: no boxed answer"
RANKS = (2,)
SIZE = 4


def score(rank):
    if rank == 2:
        raise ValueError("no boxed answer")
    return torch.ones(4)


def broken():
    dist.init_process_group("nccl")
    try:
        rewards = score(dist.get_rank())
        dist.all_reduce(rewards)  # <- waits
    finally:
        dist.barrier()  # <- blamed
        dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    failed = torch.zeros(1)
    try:
        rewards = score(dist.get_rank())
    except ValueError:
        failed += 1
    dist.all_reduce(failed)
    if not failed:
        dist.all_reduce(rewards)
    dist.barrier()
    dist.destroy_process_group()
