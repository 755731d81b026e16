"""Actor and critic gradients are reduced in opposite order on two ranks."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (0, 1)
SIZE = 2


def broken():
    dist.init_process_group("nccl")
    actor_group, critic_group = dist.new_group([0, 1]), dist.new_group([0, 1])
    actor, critic = torch.ones(4), torch.ones(8)
    if dist.get_rank() == 0:
        dist.all_reduce(actor, group=actor_group)  # <- blamed (rank 0)
        dist.all_reduce(critic, group=critic_group)
    else:
        dist.all_reduce(critic, group=critic_group)  # <- blamed (rank 1)
        dist.all_reduce(actor, group=actor_group)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    actor_group, critic_group = dist.new_group([0, 1]), dist.new_group([0, 1])
    actor, critic = torch.ones(4), torch.ones(8)
    dist.all_reduce(actor, group=actor_group)
    dist.all_reduce(critic, group=critic_group)
    dist.destroy_process_group()
