"""Rank 0 gathers the answers, the others gather them for everybody."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    tokens = torch.ones(6)
    gathered = [torch.empty(6) for _ in range(dist.get_world_size())]
    if dist.get_rank() == 0:
        dist.gather(tokens, gathered, dst=0)  # <- blamed
    else:
        dist.all_gather(gathered, tokens)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("gloo")
    tokens = torch.ones(6)
    gathered = [torch.empty(6) for _ in range(dist.get_world_size())]
    dist.gather(tokens, gathered if dist.get_rank() == 0 else None, dst=0)
    dist.destroy_process_group()
