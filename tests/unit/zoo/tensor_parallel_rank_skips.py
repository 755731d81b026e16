"""One rank of a tensor-parallel group skips the reduction of its logits; the rest of the world has gone on."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (2,)
SIZE = 8


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1, 2, 3]), dist.new_group([4, 5, 6, 7])]
    tokens = 0 if rank == 2 else 16
    if tokens:
        dist.all_reduce(torch.ones(tokens), group=groups[rank // 4])  # <- waits (ranks 0, 1, 3)
    dist.barrier()  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1, 2, 3]), dist.new_group([4, 5, 6, 7])]
    tokens = 0 if rank == 2 else 16
    logits = torch.zeros(16)
    logits[:tokens] = 1
    dist.all_reduce(logits, group=groups[rank // 4])
    dist.barrier()
    dist.destroy_process_group()
