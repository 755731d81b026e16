"""K11: a rank whose loss is NaN skips the optimizer step on its own."""

import math

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (2,)
SIZE = 4


def losses(rank):
    return [1.0, math.nan if rank == 2 else 1.0, 1.0]


def broken():
    dist.init_process_group("nccl")
    weight = torch.zeros(4)
    for loss in losses(dist.get_rank()):
        if math.isnan(loss):
            continue  # this rank alone leaves out a step
        gradient = torch.full((4,), loss)
        dist.all_reduce(gradient)  # <- waits
        weight -= gradient
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("nccl")
    weight = torch.zeros(4)
    for loss in losses(dist.get_rank()):
        bad = torch.tensor(float(math.isnan(loss)))
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad:
            continue
        gradient = torch.full((4,), loss)
        dist.all_reduce(gradient)
        weight -= gradient
    assert weight.tolist() == [-8.0] * 4
    dist.destroy_process_group()
