"""The trainer notifies the engines before they wait, and nobody notes that it did."""

import threading

import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4


def programs():
    resumed = threading.Condition()
    version = []

    def broken():
        dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            with resumed:
                resumed.notify_all()
        dist.barrier()
        if dist.get_rank() > 0:
            with resumed:
                resumed.wait()  # <- waits
        dist.destroy_process_group()  # <- blamed

    def mended():
        dist.init_process_group("gloo")
        if dist.get_rank() == 0:
            with resumed:
                version.append(1)
                resumed.notify_all()
        dist.barrier()
        if dist.get_rank() > 0:
            with resumed:
                resumed.wait_for(lambda: version)
        dist.destroy_process_group()

    return broken, mended


broken, mended = programs()
