"""Answers are gathered into buffers of the local size, and one rank has fewer answers."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    answers = torch.ones(3 if dist.get_rank() == 0 else 4, 16)
    gathered = [torch.empty_like(answers) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, answers)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    answers = torch.ones(3 if dist.get_rank() == 0 else 4, 16)
    counts = torch.empty(dist.get_world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([len(answers)]))
    padded = torch.zeros(int(counts.max()), 16)
    padded[: len(answers)] = answers
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    rows = torch.cat([part[:count] for part, count in zip(gathered, counts, strict=True)])
    assert len(rows) == 15
    dist.destroy_process_group()
