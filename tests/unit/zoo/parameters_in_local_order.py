"""Parameters are reduced in the order of a dict that one rank has filled from another checkpoint."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (2,)
SIZE = 4


def gradients(rank):
    found = {"lora_a": torch.ones(2, 8), "lora_b": torch.ones(8, 2), "norm": torch.ones(8)}
    return dict(reversed(found.items())) if rank == 2 else found


def broken():
    dist.init_process_group("nccl")
    for gradient in gradients(dist.get_rank()).values():
        dist.all_reduce(gradient)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    for _, gradient in sorted(gradients(dist.get_rank()).items()):
        dist.all_reduce(gradient)
    dist.destroy_process_group()
