"""The feeder fills one prompt queue too few: the range ends before the last rank."""

import queue

import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def arguments():
    return ([queue.Queue() for _ in range(SIZE)],)


def broken(queues):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        for worker in range(size - 1):
            queues[worker].put("Prove that 2 + 2 = 4.")
    prompt = queues[rank].get()  # <- blamed
    assert prompt.startswith("Prove")
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended(queues):
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        for worker in range(size):
            queues[worker].put("Prove that 2 + 2 = 4.")
    prompt = queues[rank].get()
    assert prompt.startswith("Prove")
    dist.barrier()
    dist.destroy_process_group()
