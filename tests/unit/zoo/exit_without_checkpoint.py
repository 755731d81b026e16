"""A rank that finds no checkpoint leaves with an exit status, the others wait for it."""

import sys

import torch
import torch.distributed as dist

from lightrft.errors import RankFailedError

EXPECTED = RankFailedError
CAUSE = SystemExit
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    checkpoints = [] if dist.get_rank() == 3 else ["step_100"]
    if not checkpoints:
        sys.exit(2)  # <- blamed
    dist.broadcast(torch.ones(8), src=0)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    checkpoints = [] if dist.get_rank() == 3 else ["step_100"]
    found = torch.tensor(len(checkpoints))
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if not found:
        sys.exit(2)
    dist.broadcast(torch.ones(8), src=0)
    dist.destroy_process_group()
