"""The gradient of a tied weight is reduced through its transposed view."""

import torch
import torch.distributed as dist

from lightrft.errors import RankFailedError, RefusedError

EXPECTED = RankFailedError
CAUSE = RefusedError
RANKS = (0, 1, 2, 3)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    gradient = torch.ones(4, 2)
    dist.all_reduce(gradient.t())  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("gloo")
    gradient = torch.ones(4, 2)
    dist.all_reduce(gradient)
    dist.destroy_process_group()
