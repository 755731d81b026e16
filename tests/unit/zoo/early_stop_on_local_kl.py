"""One rank stops its epochs early, because its own KL divergence is above the limit."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (1,)
SIZE = 4
LIMIT = 0.1


def kl_of(rank, epoch):
    return torch.tensor(0.2 if rank == 1 and epoch == 1 else 0.01)


def broken():
    dist.init_process_group("nccl")
    for epoch in range(3):
        if kl_of(dist.get_rank(), epoch) > LIMIT:
            break  # the others do not know
        gradient = torch.ones(8)
        dist.all_reduce(gradient)  # <- waits
    dist.barrier()  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    for epoch in range(3):
        kl = kl_of(dist.get_rank(), epoch)
        dist.all_reduce(kl, op=dist.ReduceOp.MAX)
        if kl > LIMIT:
            break
        gradient = torch.ones(8)
        dist.all_reduce(gradient)
    dist.barrier()
    dist.destroy_process_group()
