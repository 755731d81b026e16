"""The engine gives the trainer 30 seconds to publish its weights; it takes a minute."""

import time
from datetime import timedelta

import torch.distributed as dist

from lightrft.errors import RankFailedError

ROW = "F10"
EXPECTED = RankFailedError
CAUSE = dist.DistStoreError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    store = dist.TCPStore("127.0.0.1", 29600, is_master=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        time.sleep(60)
        store.set("weights", "ready")
    elif dist.get_rank() == 3:
        store.wait(["weights"], timedelta(seconds=30))  # <- blamed
    dist.barrier()  # <- waits (ranks 1, 2)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("gloo")
    store = dist.TCPStore("127.0.0.1", 29600, is_master=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        time.sleep(60)
        store.set("weights", "ready")
    elif dist.get_rank() == 3:
        store.wait(["weights"], timedelta(seconds=300))
    dist.barrier()
    dist.destroy_process_group()
