"""Two pipeline stages exchange activations and gradients in one batch; one leaves out its receive."""

import torch
import torch.distributed as dist

from lightrft.errors import DeadlockError

EXPECTED = DeadlockError
RANKS = (2,)
SIZE = 4


def broken():
    dist.init_process_group("nccl")
    rank, sent, received = dist.get_rank(), torch.ones(8), torch.empty(8)
    if rank >= 2:
        operations = [dist.P2POp(dist.isend, sent, 5 - rank)]
        if rank == 2:
            operations.append(dist.P2POp(dist.irecv, received, 5 - rank))
        for handle in dist.batch_isend_irecv(operations):  # <- blamed
            handle.wait()
    dist.barrier()  # <- waits
    dist.destroy_process_group()


def mended():
    dist.init_process_group("nccl")
    rank, sent, received = dist.get_rank(), torch.ones(8), torch.empty(8)
    if rank >= 2:
        operations = [dist.P2POp(dist.isend, sent, 5 - rank), dist.P2POp(dist.irecv, received, 5 - rank)]
        for handle in dist.batch_isend_irecv(operations):
            handle.wait()
    dist.barrier()
    dist.destroy_process_group()
