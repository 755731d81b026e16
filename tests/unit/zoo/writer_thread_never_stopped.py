"""A rank joins the thread that writes its checkpoints without telling it to stop."""

import queue
import threading

import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (2,)
SIZE = 4


def write(jobs, written):
    while (job := jobs.get()) is not None:
        written.append(job)


def broken():
    dist.init_process_group("nccl")
    jobs, written = queue.Queue(), []
    writer = threading.Thread(target=write, args=(jobs, written))
    writer.start()
    jobs.put("step_100")
    if dist.get_rank() != 2:
        jobs.put(None)
    writer.join()  # <- blamed
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    jobs, written = queue.Queue(), []
    writer = threading.Thread(target=write, args=(jobs, written))
    writer.start()
    jobs.put("step_100")
    jobs.put(None)
    writer.join()
    assert written == ["step_100"]
    dist.barrier()
    dist.destroy_process_group()
