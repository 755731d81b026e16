"""Ranks log the loss after every micro-batch; the one with fewer goes on to the evaluation."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

ROW = "F11"
EXPECTED = CollectiveMismatchError
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    for _ in range(2 if rank == 0 else 3):
        loss = torch.rand(1)
        dist.all_reduce(loss, op=dist.ReduceOp.AVG)  # <- waits
    scores = [torch.empty(5) for _ in range(dist.get_world_size())]
    dist.all_gather(scores, torch.rand(5))  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    total = torch.zeros(2)
    for _ in range(2 if rank == 0 else 3):
        total += torch.tensor([torch.rand(1).item(), 1.0])
    dist.all_reduce(total)
    scores = [torch.empty(5) for _ in range(dist.get_world_size())]
    dist.all_gather(scores, torch.rand(5))
    dist.destroy_process_group()
