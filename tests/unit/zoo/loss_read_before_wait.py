"""The reduced loss is checked while its reduction is still under way."""

import torch
import torch.distributed as dist

from lightrft.errors import RankFailedError

EXPECTED = RankFailedError
CAUSE = AssertionError
RANKS = (0, 1, 2, 3)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    loss = torch.ones(1)
    handle = dist.all_reduce(loss, async_op=True)
    assert loss.isfinite()  # <- blamed
    handle.wait()
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    loss = torch.ones(1)
    handle = dist.all_reduce(loss, async_op=True)
    handle.wait()
    assert loss.isfinite()
    dist.destroy_process_group()
