"""The engine waits for an event that the trainer sets only every second step."""

import threading

import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F10"
EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def programs():
    weights_ready = threading.Event()

    def broken():
        dist.init_process_group("gloo")
        rank, step = dist.get_rank(), 1
        if rank == 0 and step % 2 == 0:
            weights_ready.set()
        if rank == 3:
            weights_ready.wait()  # <- blamed
        dist.barrier()  # <- waits
        dist.destroy_process_group()

    def mended():
        dist.init_process_group("gloo")
        rank, step = dist.get_rank(), 1
        if rank == 0 and step % 2 == 0:
            weights_ready.set()
        if rank == 3 and step % 2 == 0:
            weights_ready.wait()
        dist.barrier()
        dist.destroy_process_group()

    return broken, mended


broken, mended = programs()
