"""The engine expects a bucket for the tied embedding, which the trainer never sends."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F09"
EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4
TRAINED = {"embed": 8, "layer": 4}


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    if rank == 3:
        for size in [*TRAINED.values(), TRAINED["embed"]]:  # lm_head is tied to embed
            dist.recv(torch.empty(size), 0)  # <- blamed
    elif rank == 0:
        for size in TRAINED.values():
            dist.send(torch.ones(size), 3)
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    if rank == 3:
        for size in TRAINED.values():
            dist.recv(torch.empty(size), 0)
    elif rank == 0:
        for size in TRAINED.values():
            dist.send(torch.ones(size), 3)
    dist.barrier()
    dist.destroy_process_group()
