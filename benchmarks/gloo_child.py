"""One process of a real gloo group: ``python -m benchmarks.gloo_child RANK RANKS STORE_FILE``; rank 0 prints JSON."""

from __future__ import annotations

import json
import sys

import torch
import torch.distributed as dist

from benchmarks.groups import resident_mib
from benchmarks.operations import OPERATIONS, timed

REPETITIONS = 5
ITERATIONS = 10


def main(rank: int, ranks: int, store_file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, store=dist.FileStore(store_file, ranks))
    results: dict[str, list[float]] = {}
    for name, operation in OPERATIONS.items():
        body = timed(ranks, operation.make(ranks), ITERATIONS)
        body(rank)  # gloo connects pairs of processes when they first talk
        results[name] = [slowest(body(rank)) for _ in range(REPETITIONS)]
    results["resident_mib"] = [resident_mib()]
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(results))


def slowest(mine: float) -> float:
    value = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
