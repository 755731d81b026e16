"""An expert that got no tokens leaves out the backward pass, and the reduction inside it."""

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce

from lightrft.errors import DeadlockError

ROW = "F11"
EXPECTED = DeadlockError
RANKS = (2,)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    expert = torch.nn.Linear(4, 1)
    tokens = torch.ones(0 if dist.get_rank() == 2 else 8, 4)
    hidden = all_reduce(expert(tokens).sum())
    if len(tokens):
        hidden.backward()  # <- waits
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("gloo")
    expert = torch.nn.Linear(4, 1)
    tokens = torch.ones(0 if dist.get_rank() == 2 else 8, 4)
    hidden = all_reduce(expert(tokens).sum())
    hidden.backward()
    assert expert.weight.grad.isfinite().all()
    dist.destroy_process_group()
