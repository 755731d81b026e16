"""A rank waits for the future of a rollout that it dropped because the weights were stale."""

from concurrent.futures import Future

import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (2,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rollout, weight_version = Future(), 3
    started_with = 2 if dist.get_rank() == 2 else 3
    if started_with == weight_version:
        rollout.set_result("4")
    assert rollout.result() == "4"  # <- blamed
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rollout, weight_version = Future(), 3
    started_with = 2 if dist.get_rank() == 2 else 3
    rollout.set_result("4" if started_with == weight_version else "")
    assert rollout.result() in ("4", "")
    dist.barrier()
    dist.destroy_process_group()
