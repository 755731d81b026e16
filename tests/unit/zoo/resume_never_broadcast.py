"""After the weight sync the engine waits for the order to resume; the trainers begin the next step."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F10"
EXPECTED = CollectiveMismatchError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    weights, order = torch.ones(16), ["resume"]
    dist.broadcast(weights, src=0)
    if dist.get_rank() == 3:
        dist.broadcast_object_list(order, src=0)  # <- blamed
    rewards = torch.ones(4)
    dist.all_reduce(rewards)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    weights, order = torch.ones(16), ["resume"]
    dist.broadcast(weights, src=0)
    dist.broadcast_object_list(order, src=0)
    rewards = torch.ones(4)
    dist.all_reduce(rewards)
    dist.destroy_process_group()
