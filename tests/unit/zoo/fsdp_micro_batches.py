"""Under FSDP2 every forward pass gathers parameters: ranks with fewer micro-batches leave the others alone."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightrft.errors import DeadlockError

ROW = "F11"
EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("gloo")
    policy = torch.nn.Linear(4, 4)
    fully_shard(policy, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    for _ in range(1 if dist.get_rank() == 3 else 2):
        loss = policy(torch.ones(2, 4)).sum()  # <- waits
        loss.backward()
    dist.destroy_process_group()  # <- blamed


def mended():
    dist.init_process_group("gloo")
    policy = torch.nn.Linear(4, 4)
    fully_shard(policy, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    count = torch.tensor(1 if dist.get_rank() == 3 else 2)
    dist.all_reduce(count, op=dist.ReduceOp.MAX)
    for _ in range(int(count)):
        loss = policy(torch.ones(2, 4)).sum()
        loss.backward()
    dist.destroy_process_group()
