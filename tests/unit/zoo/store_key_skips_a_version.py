"""The trainer publishes every second version, the engine waits for each of them."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F10"
EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    rank, store = dist.get_rank(), dist.TCPStore("127.0.0.1", 29600, is_master=dist.get_rank() == 0)
    for version in (1, 2):
        dist.all_reduce(torch.ones(4))  # <- waits
        if rank == 0 and version % 2 == 0:
            store.set(f"weights/{version}", "done")
        if rank == 3:
            store.wait([f"weights/{version}"])  # <- blamed
    dist.barrier()
    dist.destroy_process_group()


def mended():
    dist.init_process_group("gloo")
    rank, store = dist.get_rank(), dist.TCPStore("127.0.0.1", 29600, is_master=dist.get_rank() == 0)
    for version in (1, 2):
        dist.all_reduce(torch.ones(4))
        if rank == 0:
            store.set(f"weights/{version}", "done")
        if rank == 3:
            store.wait([f"weights/{version}"])
    dist.barrier()
    dist.destroy_process_group()
