"""Two of six ranks evaluate, and the evaluation ends with a barrier of everybody."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (0, 1)
SIZE = 6


def evaluate():
    accuracy = torch.rand(1)
    dist.barrier()  # <- blamed
    return accuracy


def broken():
    dist.init_process_group("nccl")
    for step in range(2):
        if step == 1 and dist.get_rank() < 2:
            evaluate()
        gradient = torch.ones(4)
        dist.all_reduce(gradient)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    evaluators = dist.new_group([0, 1])
    for step in range(2):
        if step == 1 and dist.get_rank() < 2:
            dist.barrier(group=evaluators)
        gradient = torch.ones(4)
        dist.all_reduce(gradient)
    dist.destroy_process_group()
