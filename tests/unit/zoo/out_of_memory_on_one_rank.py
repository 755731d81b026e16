"""The longest sequence of the batch does not fit on the rank that got it."""

import torch
import torch.distributed as dist

from lightrft.errors import RankFailedError

EXPECTED = RankFailedError
CAUSE = torch.OutOfMemoryError
RANKS = (1,)
SIZE = 4
FITS = 1024


def forward(tokens):
    if tokens > FITS:
        raise torch.OutOfMemoryError(f"tried to allocate activations of {tokens} tokens")  # <- blamed
    return torch.ones(4) * tokens


def broken():
    dist.init_process_group("nccl")
    tokens = 4096 if dist.get_rank() == 1 else 512
    gradient = forward(tokens)
    dist.all_reduce(gradient)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    tokens = 4096 if dist.get_rank() == 1 else 512
    gradient = sum(forward(min(FITS, tokens - start)) for start in range(0, tokens, FITS))
    dist.all_reduce(gradient)
    dist.destroy_process_group()
