"""Rank 0 keeps the lock of the dataset cache while it waits for ranks that want the lock."""

import threading

import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4

cache = threading.Lock()


def broken():
    dist.init_process_group("nccl")
    if dist.get_rank() == 0:
        cache.acquire()
    dist.barrier()
    if dist.get_rank() > 0:
        cache.acquire()  # <- waits
    dist.barrier()  # <- blamed
    cache.release()
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    if dist.get_rank() == 0:
        with cache:
            pass
    dist.barrier()
    if dist.get_rank() > 0:
        with cache:
            pass
    dist.barrier()
    dist.destroy_process_group()
