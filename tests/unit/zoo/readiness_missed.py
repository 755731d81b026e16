"""The engine polls for a counter that one trainer never increments; the trainers outlast their timeout."""

import time
from datetime import timedelta

import torch.distributed as dist

from lightrft.errors import CollectiveTimeoutError

ROW = "F10"
EXPECTED = CollectiveTimeoutError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rank = dist.get_rank()
    store = dist.TCPStore("127.0.0.1", 29600, is_master=rank == 0)
    if rank in (1, 2):
        store.add("ready", 1)
    if rank == 3:
        while store.add("ready", 0) < 3:
            time.sleep(1)  # <- blamed
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("gloo", timeout=timedelta(minutes=5))
    rank = dist.get_rank()
    store = dist.TCPStore("127.0.0.1", 29600, is_master=rank == 0)
    if rank < 3:
        store.add("ready", 1)
    if rank == 3:
        while store.add("ready", 0) < 3:
            time.sleep(1)
    dist.barrier()
    dist.destroy_process_group()
