"""One rank of a tensor-parallel pair has no tokens and leaves its partner alone."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (1,)
SIZE = 6


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3]), dist.new_group([4, 5])]
    hidden = torch.ones(0 if rank == 1 else 16)
    if hidden.numel():
        dist.all_reduce(hidden, group=groups[rank // 2])  # <- waits (rank 0)
    dist.barrier()  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3]), dist.new_group([4, 5])]
    hidden = torch.zeros(16) if rank == 1 else torch.ones(16)
    dist.all_reduce(hidden, group=groups[rank // 2])
    dist.barrier()
    dist.destroy_process_group()
