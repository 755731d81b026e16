"""Gradients are clipped where the local norm is too large, and the global norm is reduced there."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (2,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    gradient = torch.full((4,), 5.0 if dist.get_rank() == 2 else 0.1)
    squared = gradient.square().sum()
    if squared > 1:
        dist.all_reduce(squared)  # <- blamed
        gradient /= squared.sqrt()
    dist.all_reduce(gradient)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    gradient = torch.full((4,), 5.0 if dist.get_rank() == 2 else 0.1)
    squared = gradient.square().sum()
    dist.all_reduce(squared)
    if squared > 1:
        gradient /= squared.sqrt()
    dist.all_reduce(gradient)
    dist.destroy_process_group()
