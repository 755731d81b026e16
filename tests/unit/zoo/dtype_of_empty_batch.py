"""The sum over no rewards is an integer."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (2,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rewards = [] if dist.get_rank() == 2 else [0.5, 1.0]
    total = torch.tensor(sum(rewards))  # sum([]) is the integer 0
    dist.all_reduce(total)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rewards = [] if dist.get_rank() == 2 else [0.5, 1.0]
    total = torch.tensor(sum(rewards), dtype=torch.float32)
    dist.all_reduce(total)
    assert total == 4.5
    dist.destroy_process_group()
