"""A rank with one micro-batch less never reaches the second boundary of its gradient accumulation."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F11"
EXPECTED = CollectiveMismatchError
RANKS = (3,)
SIZE = 4
ACCUMULATE = 2


def broken():
    dist.init_process_group("nccl")
    micro_batches = 3 if dist.get_rank() == 3 else 4
    gradient, steps = torch.zeros(8), torch.tensor(0)
    for index in range(micro_batches):
        gradient += 1
        if (index + 1) % ACCUMULATE == 0:
            dist.all_reduce(gradient)  # <- waits
            steps += 1
    dist.all_reduce(steps)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    micro_batches = 3 if dist.get_rank() == 3 else 4
    gradient, steps = torch.zeros(8), torch.tensor(0)
    for index in range(micro_batches):
        gradient += 1
        if (index + 1) % ACCUMULATE == 0 or index + 1 == micro_batches:
            dist.all_reduce(gradient)
            steps += 1
    dist.all_reduce(steps)
    dist.destroy_process_group()
