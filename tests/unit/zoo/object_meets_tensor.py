"""Rank 0 broadcasts its configuration as an object, the others expect a tensor."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    if dist.get_rank() == 0:
        dist.broadcast_object_list([{"temperature": 0.7}], src=0)  # <- blamed
    else:
        temperature = torch.empty(1)
        dist.broadcast(temperature, src=0)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    config = [{"temperature": 0.7} if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(config, src=0)
    assert config == [{"temperature": 0.7}]
    dist.destroy_process_group()
