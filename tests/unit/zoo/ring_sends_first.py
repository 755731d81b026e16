"""Ring attention: every rank sends its keys to the next one before it receives."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (0, 1, 2, 3)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    keys, received = torch.full((2, 8), float(rank)), torch.empty(2, 8)
    dist.send(keys, (rank + 1) % size)  # <- blamed
    dist.recv(received, (rank - 1) % size)
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank, size = dist.get_rank(), dist.get_world_size()
    keys, received = torch.full((2, 8), float(rank)), torch.empty(2, 8)
    send = dist.P2POp(dist.isend, keys, (rank + 1) % size)
    receive = dist.P2POp(dist.irecv, received, (rank - 1) % size)
    for handle in dist.batch_isend_irecv([send, receive]):
        handle.wait()
    assert received[0, 0] == (rank - 1) % size
    dist.destroy_process_group()
