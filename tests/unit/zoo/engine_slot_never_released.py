"""A rollout that fails keeps its slot of the engine, and the next rank never gets one."""

import threading

import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def arguments():
    return (threading.Semaphore(1),)


def generate(tokens):
    if tokens > 4096:
        raise ValueError("the prompt is too long")


def broken(slots):
    dist.init_process_group("gloo")
    failures = 0
    if dist.get_rank() == 1:
        slots.acquire()
        try:
            generate(tokens=5000)
            slots.release()  # not reached
        except ValueError:
            failures += 1
    dist.barrier()
    if dist.get_rank() == 3:
        slots.acquire()  # <- blamed
        generate(tokens=100)
        slots.release()
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended(slots):
    dist.init_process_group("gloo")
    failures = 0
    if dist.get_rank() == 1:
        try:
            with slots:
                generate(tokens=5000)
        except ValueError:
            failures += 1
    dist.barrier()
    if dist.get_rank() == 3:
        with slots:
            generate(tokens=100)
    dist.barrier()
    dist.destroy_process_group()
