"""Flags are combined with BOR, which nccl does not have."""

import torch
import torch.distributed as dist

from lightrft.errors import RankFailedError, RefusedError

EXPECTED = RankFailedError
CAUSE = RefusedError
RANKS = (0, 1, 2, 3)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    finished = torch.tensor([dist.get_rank() == 1], dtype=torch.uint8)
    dist.all_reduce(finished, op=dist.ReduceOp.BOR)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    finished = torch.tensor([dist.get_rank() == 1], dtype=torch.uint8)
    dist.all_reduce(finished, op=dist.ReduceOp.MAX)
    assert finished
    dist.destroy_process_group()
