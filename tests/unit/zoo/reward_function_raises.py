"""The reward function fails on one rank while the others wait to gather rewards."""

import torch
import torch.distributed as dist

from lightrft.errors import RankFailedError

EXPECTED = RankFailedError
CAUSE = ValueError
RANKS = (2,)
SIZE = 4


def score(answer):
    if "boxed" not in answer:
        raise ValueError("no boxed answer")  # <- blamed
    return 1.0


def broken():
    dist.init_process_group("nccl")
    answer = "I do not know" if dist.get_rank() == 2 else "boxed{4}"
    rewards = torch.tensor([score(answer)])
    gathered = torch.empty(dist.get_world_size())
    dist.all_gather_into_tensor(gathered, rewards)  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    answer = "I do not know" if dist.get_rank() == 2 else "boxed{4}"
    try:
        rewards = torch.tensor([score(answer)])
    except ValueError:
        rewards = torch.zeros(1)
    gathered = torch.empty(dist.get_world_size())
    dist.all_gather_into_tensor(gathered, rewards)
    assert gathered.tolist() == [1, 1, 0, 1]
    dist.destroy_process_group()
