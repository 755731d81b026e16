"""A rank posts its statistics to rank 0, which never asks for them."""

import torch
import torch.distributed as dist

from lightrft.errors import UnfinishedError

EXPECTED = UnfinishedError
RANKS = (2,)
SIZE = 4
OPTIONS = {"strict": True}


def broken():
    dist.init_process_group("nccl")
    if dist.get_rank() == 2:
        dist.isend(torch.ones(3), 0)  # <- blamed
    dist.barrier()
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    if dist.get_rank() == 2:
        dist.isend(torch.ones(3), 0).wait()
    if dist.get_rank() == 0:
        dist.recv(torch.empty(3), 2)
    dist.barrier()
    dist.destroy_process_group()
