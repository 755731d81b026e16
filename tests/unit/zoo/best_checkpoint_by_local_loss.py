"""Each rank saves the best checkpoint by its own loss, and saving is collective."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (3,)
SIZE = 4


def save(shard):
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard)  # <- waits
    return torch.cat(shards)


def broken():
    dist.init_process_group("nccl")
    best, shard = 1.0, torch.ones(4)
    for loss in (0.9, 1.2 if dist.get_rank() == 3 else 0.8):
        if loss < best:
            best = loss
            save(shard)
        dist.all_reduce(shard)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    best, shard = 1.0, torch.ones(4)
    for local in (0.9, 1.2 if dist.get_rank() == 3 else 0.8):
        loss = torch.tensor(local)
        dist.all_reduce(loss, op=dist.ReduceOp.AVG)
        if loss < best:
            best = loss
            save(shard)
        dist.all_reduce(shard)
    dist.destroy_process_group()
