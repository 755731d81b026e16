"""A rank without samples skips the reduction of its gradient."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    samples = [] if dist.get_rank() == 3 else [1.0, 2.0]
    gradient = torch.tensor(samples).sum()
    if samples:
        dist.all_reduce(gradient)  # <- waits
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("nccl")
    samples = [] if dist.get_rank() == 3 else [1.0, 2.0]
    gradient = torch.tensor(samples).sum()
    dist.all_reduce(gradient)
    assert gradient == 9
    dist.destroy_process_group()
