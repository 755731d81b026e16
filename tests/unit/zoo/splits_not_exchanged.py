"""Samples are sent to the ranks that score them; one rank assumes that it receives an equal share."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (2,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    sent = [1, 1, 2, 0]
    received = [sent[rank]] * size
    if rank == 2:
        received = [1] * size  # its share is 2 from each
    samples, mine = torch.ones(sum(sent), 8), torch.empty(sum(received), 8)
    dist.all_to_all_single(mine, samples, received, sent)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    sent = torch.tensor([1, 1, 2, 0])
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent)
    samples, mine = torch.ones(int(sent.sum()), 8), torch.empty(int(received.sum()), 8)
    dist.all_to_all_single(mine, samples, received.tolist(), sent.tolist())
    assert mine.eq(1).all()
    dist.destroy_process_group()
