"""Two asynchronous reductions in crossed order are legal, unless each is waited for before the next is issued."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (3,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    actor_group, critic_group = dist.new_group(), dist.new_group()
    actor, critic = torch.ones(4), torch.ones(8)
    if dist.get_rank() < 3:
        dist.all_reduce(actor, group=actor_group, async_op=True).wait()  # <- waits
        dist.all_reduce(critic, group=critic_group, async_op=True).wait()
    else:
        dist.all_reduce(critic, group=critic_group, async_op=True).wait()  # <- blamed
        dist.all_reduce(actor, group=actor_group, async_op=True).wait()
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    actor_group, critic_group = dist.new_group(), dist.new_group()
    actor, critic = torch.ones(4), torch.ones(8)
    pairs = [(actor, actor_group), (critic, critic_group)]
    if dist.get_rank() == 3:
        pairs.reverse()
    handles = [dist.all_reduce(tensor, group=group, async_op=True) for tensor, group in pairs]
    for handle in handles:
        handle.wait()
    assert actor.sum() == 16
    assert critic.sum() == 32
    dist.destroy_process_group()
