"""Rank 0 saves the checkpoint, but its shards have to be gathered from everybody."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (0,)
SIZE = 4


def full_state(shard):
    full = torch.empty(len(shard) * dist.get_world_size())
    dist.all_gather_into_tensor(full, shard)  # <- blamed
    return {"policy": full}


def broken():
    dist.init_process_group("nccl")
    checkpoints = {}
    for step in range(2):
        shard = torch.ones(4)
        dist.all_reduce(shard)  # <- waits
        if dist.get_rank() == 0:
            checkpoints[step] = full_state(shard)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    checkpoints = {}
    for step in range(2):
        shard = torch.ones(4)
        dist.all_reduce(shard)
        state = full_state(shard)
        if dist.get_rank() == 0:
            checkpoints[step] = state
    dist.destroy_process_group()
