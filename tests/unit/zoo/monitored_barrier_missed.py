"""A rank that is still downloading misses the monitored barrier; rank 0 names it."""

from datetime import timedelta

import torch.distributed as dist

from lightrft.errors import RankFailedError

EXPECTED = RankFailedError
CAUSE = RuntimeError
SAYS = "[Rank 0]: Rank 3 failed to pass monitoredBarrier"
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    cached = dist.get_rank() != 3
    if cached:
        dist.monitored_barrier(timeout=timedelta(seconds=30))  # <- blamed
    dist.destroy_process_group()  # <- waits (rank 3)


def mended():
    dist.init_process_group("gloo")
    dist.monitored_barrier(timeout=timedelta(seconds=30))
    dist.destroy_process_group()
