"""A rank without finished answers sums its loss where the others average theirs."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (1,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    loss = torch.tensor(0.0 if dist.get_rank() == 1 else 2.0)
    if loss:
        dist.all_reduce(loss, op=dist.ReduceOp.AVG)  # <- waits
    else:
        dist.all_reduce(loss)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    loss = torch.tensor(0.0 if dist.get_rank() == 1 else 2.0)
    dist.all_reduce(loss, op=dist.ReduceOp.AVG)
    assert loss == 1.5
    dist.destroy_process_group()
