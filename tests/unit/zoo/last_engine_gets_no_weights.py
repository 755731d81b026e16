"""Four engines wait for weights, the loop that sends them ends one too early."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F09"
EXPECTED = DeadlockError
RANKS = (7,)
SIZE = 8


def broken():
    dist.init_process_group("nccl")
    rank, weights = dist.get_rank(), torch.ones(16)
    engines = dist.new_group([4, 5, 6, 7])
    if rank == 0:
        for engine in range(4, dist.get_world_size() - 1):
            dist.send(weights, engine)
    if rank >= 4:
        dist.recv(weights, 0)  # <- blamed
        dist.barrier(group=engines)  # <- waits (ranks 4, 5, 6)
    dist.barrier()  # <- waits (ranks 0, 1, 2, 3)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank, weights = dist.get_rank(), torch.ones(16)
    engines = dist.new_group([4, 5, 6, 7])
    if rank == 0:
        for engine in range(4, dist.get_world_size()):
            dist.send(weights, engine)
    if rank >= 4:
        dist.recv(weights, 0)
        dist.barrier(group=engines)
    dist.barrier()
    dist.destroy_process_group()
