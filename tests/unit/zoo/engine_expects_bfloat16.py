"""The trainer sends its float32 master weights, the engine receives them as bfloat16."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F09"
EXPECTED = CollectiveMismatchError
RANKS = (0, 3)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank, weights = dist.get_rank(), torch.ones(16)
    if rank == 0:
        dist.send(weights, 3)  # <- blamed (rank 0)
    elif rank == 3:
        received = torch.empty(16, dtype=torch.bfloat16)
        dist.recv(received, 0)  # <- blamed (rank 3)
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank, weights = dist.get_rank(), torch.ones(16)
    if rank == 0:
        dist.send(weights.bfloat16(), 3)
    elif rank == 3:
        received = torch.empty(16, dtype=torch.bfloat16)
        dist.recv(received, 0)
    dist.barrier()
    dist.destroy_process_group()
