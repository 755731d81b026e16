"""One rank was started with another ZeRO stage: it reduces whole gradients where the others scatter them."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F11"
EXPECTED = CollectiveMismatchError
RANKS = (1,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    gradient = torch.ones(16)
    stage = 1 if dist.get_rank() == 1 else 2
    if stage == 1:
        dist.all_reduce(gradient)  # <- blamed
    else:
        dist.reduce_scatter_tensor(torch.empty(4), gradient)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    gradient = torch.ones(16)
    stages = [None] * dist.get_world_size()
    dist.all_gather_object(stages, 1 if dist.get_rank() == 1 else 2)
    if min(stages) == 1:
        dist.all_reduce(gradient)
    else:
        dist.reduce_scatter_tensor(torch.empty(4), gradient)
    dist.destroy_process_group()
