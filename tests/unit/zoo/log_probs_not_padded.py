"""Log-probs are reduced at the length of the longest answer on each rank."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    longest = 12 if dist.get_rank() == 3 else 9
    log_probs = torch.zeros(2, longest)
    dist.all_reduce(log_probs)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    longest = torch.tensor(12 if dist.get_rank() == 3 else 9)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    log_probs = torch.zeros(2, int(longest))
    dist.all_reduce(log_probs)
    dist.destroy_process_group()
