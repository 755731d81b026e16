"""The metrics of one rank hold a generator, which cannot be sent."""

import torch.distributed as dist

from lightrft.errors import RankFailedError

EXPECTED = RankFailedError
CAUSE = TypeError
RANKS = (1,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    lengths = [12, 40, 7]
    metrics = {"lengths": (n for n in lengths) if dist.get_rank() == 1 else lengths}
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, metrics)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    lengths = [12, 40, 7]
    metrics = {"lengths": lengths}
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, metrics)
    assert gathered[1] == metrics
    dist.destroy_process_group()
