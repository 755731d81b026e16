"""Only rank 0 loads the weights; the others build the model without memory, and never give it any."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (1, 2, 3)
SIZE = 4
SAYS = "the device differs between ranks"


def build():
    with torch.device("cpu" if dist.get_rank() == 0 else "meta"):
        return torch.nn.Linear(4, 4)


def broken():
    dist.init_process_group("nccl")
    model = build()
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)  # <- blamed
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    model = build()
    if dist.get_rank() != 0:
        model.to_empty(device="cpu")
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    dist.destroy_process_group()
