"""Rank 3 gets an empty batch and leaves before the all_reduce. On a cluster the other ranks would wait for it.

Run it: lightrft sim -n 8 examples/first_hang.py
"""

import os

import torch
import torch.distributed as dist


def mean_loss(batch: torch.Tensor) -> torch.Tensor:
    if batch.numel() == 0:
        return batch.sum()  # the bug: this rank never reaches the all_reduce
    loss = batch.mean()
    dist.all_reduce(loss)
    return loss / dist.get_world_size()


def main() -> None:
    dist.init_process_group("nccl")
    rank, local_rank = dist.get_rank(), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    batch = torch.full((0 if rank == 3 else 4,), float(rank), device=device)
    print(f"rank {rank}: mean loss {mean_loss(batch):.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
