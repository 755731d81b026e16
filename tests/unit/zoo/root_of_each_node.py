"""The weights come from the first rank of each node, over the group of all nodes."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (4, 5)
SIZE = 6
OPTIONS = {"gpus_per_node": 4}


def broken():
    dist.init_process_group("nccl")
    weights = torch.ones(16)
    leader = dist.get_rank() // 4 * 4
    dist.broadcast(weights, src=leader)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    weights = torch.ones(16)
    nodes = [dist.new_group([0, 1, 2, 3]), dist.new_group([4, 5])]
    leader = dist.get_rank() // 4 * 4
    dist.broadcast(weights, src=leader, group=nodes[leader // 4])
    dist.destroy_process_group()
