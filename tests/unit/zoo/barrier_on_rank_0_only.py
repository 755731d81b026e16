"""The barrier behind the checkpoint stands inside the branch of rank 0."""

import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    saved = []
    if dist.get_rank() == 0:
        saved.append("step_100")
        dist.barrier()  # <- blamed
    dist.destroy_process_group()  # <- waits


def mended():
    dist.init_process_group("nccl")
    saved = []
    if dist.get_rank() == 0:
        saved.append("step_100")
    dist.barrier()
    dist.destroy_process_group()
