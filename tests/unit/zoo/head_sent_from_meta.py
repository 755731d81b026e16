"""The trainer has filled the layers of its checkpoint; its reward head is new, and still without memory."""

import torch
import torch.distributed as dist

from lightrft.errors import CollectiveMismatchError

EXPECTED = CollectiveMismatchError
RANKS = (0,)
SIZE = 3
SAYS = "sent from meta, received on cpu"


def filled():
    with torch.device("meta"):
        model = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 1)})
    model["body"].to_empty(device="cpu")
    return model


def exchange(model):
    received = torch.nn.ModuleDict({"body": torch.nn.Linear(4, 4), "head": torch.nn.Linear(4, 1)})
    for ours, theirs in zip(model.parameters(), received.parameters(), strict=True):
        if dist.get_rank() == 0:
            dist.send(ours.data, 2)  # <- blamed
        elif dist.get_rank() == 2:
            dist.recv(theirs.data, 0)  # <- waits (rank 2)
    dist.barrier()  # <- waits (rank 1)
    dist.destroy_process_group()


def broken():
    dist.init_process_group("nccl")
    exchange(filled())


def mended():
    dist.init_process_group("nccl")
    model = filled()
    model["head"].to_empty(device="cpu")
    exchange(model)
