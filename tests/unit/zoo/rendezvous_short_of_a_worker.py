"""The master of the engine's rendezvous waits for more workers than were started."""

import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F10"
EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank in (0, 3):
        workers = 1 + 2  # rank 0 and two engines, of which one was never started
        dist.TCPStore("127.0.0.1", 29700, workers, is_master=rank == 0)  # <- blamed
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    if rank in (0, 3):
        workers = 1 + 1
        dist.TCPStore("127.0.0.1", 29700, workers, is_master=rank == 0)
    dist.barrier()
    dist.destroy_process_group()
