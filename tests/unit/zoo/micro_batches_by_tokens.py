"""Packing by tokens gives one rank a micro-batch more; its parameters are gathered once more than elsewhere."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F11"
EXPECTED = CollectiveMismatchError
RANKS = (1,)
SIZE = 4


def micro_batches(rank):
    lengths = [900, 800, 700] if rank == 1 else [500, 400, 300]
    return -(-sum(lengths) // 1200)


def broken():
    dist.init_process_group("nccl")
    shard, parameters = torch.ones(4), torch.empty(16)
    for _ in range(micro_batches(dist.get_rank())):  # 2 on rank 1, 1 elsewhere
        dist.all_gather_into_tensor(parameters, shard)  # <- blamed
        gradient = parameters * 2
    dist.reduce_scatter_tensor(shard, gradient)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    shard, parameters = torch.ones(4), torch.empty(16)
    count = torch.tensor(micro_batches(dist.get_rank()))
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    for _ in range(int(count)):
        dist.all_gather_into_tensor(parameters, shard)
        gradient = parameters * 2
    dist.reduce_scatter_tensor(shard, gradient)
    dist.destroy_process_group()
