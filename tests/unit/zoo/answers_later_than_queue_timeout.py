"""The engine needs two minutes for its answers, the trainer gives it one."""

import queue
import time

import torch.distributed as dist

from lightrft.errors import RankFailedError

EXPECTED = RankFailedError
CAUSE = queue.Empty
RANKS = (0,)
SIZE = 4


def arguments():
    return (queue.Queue(),)


def broken(answers):
    dist.init_process_group("gloo")
    if dist.get_rank() == 3:
        time.sleep(120)
        answers.put(["4"])
    if dist.get_rank() == 0:
        assert answers.get(timeout=60) == ["4"]  # <- blamed
    dist.barrier()  # <- waits (ranks 1, 2)
    dist.destroy_process_group()


def mended(answers):
    dist.init_process_group("gloo")
    if dist.get_rank() == 3:
        time.sleep(120)
        answers.put(["4"])
    if dist.get_rank() == 0:
        assert answers.get(timeout=600) == ["4"]
    dist.barrier()
    dist.destroy_process_group()
