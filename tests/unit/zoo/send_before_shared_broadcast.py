"""Rank 0 sends weights while the engine, like everybody else, still waits for the broadcast of the step."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F09"
EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    weights, step = torch.ones(16), torch.tensor([5])
    if rank == 0:
        dist.send(weights, 3)  # <- blamed
    dist.broadcast(step, src=0)  # <- waits
    if rank == 3:
        dist.recv(weights, 0)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    weights, step = torch.ones(16), torch.tensor([5])
    dist.broadcast(step, src=0)
    if rank == 0:
        dist.send(weights, 3)
    if rank == 3:
        dist.recv(weights, 0)
    dist.destroy_process_group()
