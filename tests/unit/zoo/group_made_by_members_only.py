"""The trainers make their group without the engine, which has to make it as well."""

import torch
import torch.distributed as dist

from lightrft.errors import UnfinishedError

ROW = "F10"
EXPECTED = UnfinishedError
RANKS = (3,)
SIZE = 4
OPTIONS = {"strict": True}


def broken():
    dist.init_process_group("nccl")
    if dist.get_rank() < 3:
        trainers = dist.new_group([0, 1, 2])  # <- waits
        dist.all_reduce(torch.ones(4), group=trainers)
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("nccl")
    trainers = dist.new_group([0, 1, 2])
    if dist.get_rank() < 3:
        dist.all_reduce(torch.ones(4), group=trainers)
    dist.destroy_process_group()
