"""The last node sees the end of its data a step before the others, in every data-parallel group."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F11"
EXPECTED = DeadlockError
RANKS = (6, 7)
SIZE = 8
OPTIONS = {"gpus_per_node": 2}


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2, 4, 6]), dist.new_group([1, 3, 5, 7])]
    for _ in range(2 if rank >= 6 else 3):
        dist.all_reduce(torch.ones(4), group=groups[rank % 2])  # <- waits
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    groups = [dist.new_group([0, 2, 4, 6]), dist.new_group([1, 3, 5, 7])]
    steps = torch.tensor(2 if rank >= 6 else 3)
    dist.all_reduce(steps, op=dist.ReduceOp.MIN)
    for _ in range(int(steps)):
        dist.all_reduce(torch.ones(4), group=groups[rank % 2])
    dist.destroy_process_group()
