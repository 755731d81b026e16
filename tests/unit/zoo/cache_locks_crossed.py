"""Two ranks take the locks of the prompt cache and of the weight cache in opposite order."""

import threading

import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (0, 1)
SIZE = 2


def programs(prompts, weights):
    def broken():
        dist.init_process_group("gloo")
        first, second = (prompts, weights) if dist.get_rank() == 0 else (weights, prompts)
        with first:
            dist.barrier()
            with second:  # <- blamed
                pass
        dist.destroy_process_group()

    def mended():
        dist.init_process_group("gloo")
        dist.barrier()
        with prompts, weights:
            pass
        dist.destroy_process_group()

    return broken, mended


broken, mended = programs(threading.Lock(), threading.Lock())
