"""Trainer and engine each wait for the other to speak first."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F10"
EXPECTED = DeadlockError
RANKS = (0, 1)
SIZE = 2


def broken():
    dist.init_process_group("nccl")
    version = torch.tensor([7])
    if dist.get_rank() == 0:
        ready = torch.empty(1)
        dist.recv(ready, 1)  # <- blamed (rank 0)
        dist.send(version, 1)
    else:
        dist.recv(version, 0)  # <- blamed (rank 1)
        dist.send(torch.ones(1), 0)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    version = torch.tensor([7])
    if dist.get_rank() == 0:
        ready = torch.empty(1)
        dist.recv(ready, 1)
        dist.send(version, 1)
    else:
        dist.send(torch.ones(1), 0)
        dist.recv(version, 0)
    dist.destroy_process_group()
