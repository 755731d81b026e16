"""The trainers make their group without the engine, which has to make it as well."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F10"
EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    if dist.get_rank() < 3:
        trainers = dist.new_group([0, 1, 2])  # <- waits
        dist.all_reduce(torch.ones(4), group=trainers)
    dist.barrier()  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    trainers = dist.new_group([0, 1, 2])
    if dist.get_rank() < 3:
        dist.all_reduce(torch.ones(4), group=trainers)
    dist.barrier()
    dist.destroy_process_group()
