"""The last rank's data loader is one batch short, because the data set does not divide evenly."""

import torch.distributed as dist
from torch.utils.data import DataLoader

from lightrft.errors import DeadlockError

ROW = "F11"
EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4
PROMPTS = 23


def broken():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = list(range(rank, PROMPTS, size))  # 6, 6, 6 and 5 prompts
    for batch in DataLoader(mine, batch_size=2, drop_last=True):
        dist.all_reduce(batch.float())  # <- waits
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    even = PROMPTS // size
    mine = list(range(rank, PROMPTS, size))[:even]
    for batch in DataLoader(mine, batch_size=2, drop_last=True):
        dist.all_reduce(batch.float())
    dist.destroy_process_group()
