"""Under DistributedDataParallel the rank with fewer batches leaves the others in their next forward pass."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lightrft.errors import DeadlockError

ROW = "F11"
EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    critic = DistributedDataParallel(torch.nn.Linear(4, 1))
    for _ in range(1 if dist.get_rank() == 3 else 2):
        loss = critic(torch.ones(2, 4)).sum()  # <- waits
        loss.backward()
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("gloo")
    critic = DistributedDataParallel(torch.nn.Linear(4, 1))
    batches = torch.tensor(1 if dist.get_rank() == 3 else 2)
    dist.all_reduce(batches, op=dist.ReduceOp.MIN)
    for _ in range(int(batches)):
        loss = critic(torch.ones(2, 4)).sum()
        loss.backward()
    dist.destroy_process_group()
