"""The gather of a sharded parameter stands inside the loop that only the sending rank runs."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

ROW = "F09"
EXPECTED = DeadlockError
RANKS = (0,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    trainers = dist.new_group([0, 1, 2])
    shard, full = torch.ones(4), torch.empty(12)
    if rank == 0:
        dist.all_gather_into_tensor(full, shard, group=trainers)  # <- blamed
        dist.send(full, 3)
    elif rank == 3:
        dist.recv(full, 0)  # <- waits (rank 3)
    dist.barrier()  # <- waits (ranks 1, 2)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    trainers = dist.new_group([0, 1, 2])
    shard, full = torch.ones(4), torch.empty(12)
    if rank < 3:
        dist.all_gather_into_tensor(full, shard, group=trainers)
    if rank == 0:
        dist.send(full, 3)
    elif rank == 3:
        dist.recv(full, 0)
    dist.barrier()
    dist.destroy_process_group()
