"""The engine expects the weights first, the trainers send the version first."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F10"
EXPECTED = CollectiveMismatchError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    version, weights = torch.tensor([3]), torch.ones(16)
    if dist.get_rank() < 3:
        dist.broadcast(version, src=0)  # <- waits
        dist.broadcast(weights, src=0)
    else:
        dist.broadcast(weights, src=0)  # <- blamed
        dist.broadcast(version, src=0)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    version, weights = torch.tensor([3]), torch.ones(16)
    dist.broadcast(version, src=0)
    dist.broadcast(weights, src=0)
    dist.destroy_process_group()
