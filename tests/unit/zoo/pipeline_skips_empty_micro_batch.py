"""The first pipeline stage skips an empty micro-batch, the later stages wait for its activations."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F11"
EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4
MICRO_BATCHES = [4, 0, 4]


def broken():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    for samples in MICRO_BATCHES:
        hidden = torch.ones(4, 8)
        if rank == 0 and samples == 0:
            continue  # the next stage is not told
        if rank > 0:
            dist.recv(hidden, rank - 1)  # <- waits
        if rank < size - 1:
            dist.send(hidden, rank + 1)
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    for samples in MICRO_BATCHES:
        hidden = torch.ones(4, 8)
        if samples == 0:
            continue
        if rank > 0:
            dist.recv(hidden, rank - 1)
        if rank < size - 1:
            dist.send(hidden, rank + 1)
    dist.destroy_process_group()
