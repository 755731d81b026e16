"""A rank starts the reductions of its gradients and waits for all but the last."""

import torch
import torch.distributed as dist

from lightrft.errors import UnfinishedError

EXPECTED = UnfinishedError
RANKS = (1,)
SIZE = 4
OPTIONS = {"strict": True}


def broken():
    dist.init_process_group("nccl")
    gradients = torch.ones(3, 4)
    handles = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]  # <- blamed
    if dist.get_rank() == 1:
        handles.pop()
    for handle in handles:
        handle.wait()
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    gradients = torch.ones(3, 4)
    handles = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
    for handle in handles:
        handle.wait()
    assert gradients.eq(4).all()
    dist.destroy_process_group()
