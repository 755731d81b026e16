"""Rank 0 answers the engine only after a reduction in which the engine takes part."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F09"
EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    tokens, weights = torch.tensor([100]), torch.ones(16)
    if rank == 3:
        dist.recv(weights, 0)  # <- blamed
        dist.all_reduce(tokens)
    else:
        dist.all_reduce(tokens)  # <- waits
    if rank == 0:
        dist.send(weights, 3)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    tokens, weights = torch.tensor([100]), torch.ones(16)
    dist.all_reduce(tokens)
    if rank == 3:
        dist.recv(weights, 0)
    if rank == 0:
        dist.send(weights, 3)
    dist.destroy_process_group()
