"""A weight is sent as the trainer holds it and received as the engine holds it: transposed."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F09"
EXPECTED = CollectiveMismatchError
RANKS = (0, 3)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    if rank == 0:
        dist.send(torch.ones(8, 2), 3)  # <- blamed (rank 0)
    elif rank == 3:
        dist.recv(torch.empty(2, 8), 0)  # <- blamed (rank 3)
    dist.all_reduce(torch.ones(1))  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    if rank == 0:
        dist.send(torch.ones(8, 2).t().contiguous(), 3)
    elif rank == 3:
        dist.recv(torch.empty(2, 8), 0)
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()
