"""Writing the checkpoint takes one rank longer than the timeout of the group in which the others wait."""

import time
from datetime import timedelta

import torch.distributed as dist

from lightrft.errors import CollectiveTimeoutError

EXPECTED = CollectiveTimeoutError
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("nccl", timeout=timedelta(minutes=10))
    if dist.get_rank() == 0:
        time.sleep(20 * 60)  # <- blamed
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl", timeout=timedelta(minutes=30))
    if dist.get_rank() == 0:
        time.sleep(20 * 60)
    dist.barrier()
    dist.destroy_process_group()
