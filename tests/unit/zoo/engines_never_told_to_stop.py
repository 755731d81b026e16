"""The engines wait for the next version; the trainer has left its loop without the message that ends theirs."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F10"
EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4
STOP = -1


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    sync = dist.new_group([0, 2, 3])
    if rank == 0:
        for version in range(3):
            dist.broadcast(torch.tensor([version]), src=0, group=sync)
    elif rank >= 2:
        version = torch.zeros(1, dtype=torch.int64)
        while version != STOP:
            dist.broadcast(version, src=0, group=sync)  # <- waits (ranks 2, 3)
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    sync = dist.new_group([0, 2, 3])
    if rank == 0:
        for version in [*range(3), STOP]:
            dist.broadcast(torch.tensor([version]), src=0, group=sync)
    elif rank >= 2:
        version = torch.zeros(1, dtype=torch.int64)
        while version != STOP:
            dist.broadcast(version, src=0, group=sync)
    dist.destroy_process_group()
