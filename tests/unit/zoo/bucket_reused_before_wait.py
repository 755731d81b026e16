"""The buffer of an asynchronous gather is filled with the next bucket before the first has left."""

import torch
import torch.distributed as dist

from lightrft.errors import RankFailedError, RefusedError

EXPECTED = RankFailedError
CAUSE = RefusedError
RANKS = (0, 1, 2, 3)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    bucket, full = torch.zeros(4), torch.empty(2, 16)
    for index in range(2):
        bucket.fill_(index + 1)
        handle = dist.all_gather_into_tensor(full[index], bucket, async_op=True)
        bucket.zero_()
        handle.wait()  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    bucket, full = torch.zeros(4), torch.empty(2, 16)
    for index in range(2):
        bucket.fill_(index + 1)
        handle = dist.all_gather_into_tensor(full[index], bucket, async_op=True)
        handle.wait()
        bucket.zero_()
    assert full.mean() == 1.5
    dist.destroy_process_group()
