"""What a rank finds when it starts, on simulated ranks and on real processes: torchrun's environment, and a seed."""

from __future__ import annotations

__all__ = ["rank_seed", "torchrun_environ"]


def rank_seed(seed: int, rank: int) -> int:
    """The seed of ``rank`` in a world of ``seed``, for the generators of torch, Python and NumPy."""
    return seed * 1_000_003 + rank


def torchrun_environ(rank: int, size: int, *, gpus_per_node: int, port: int, threads: str) -> dict[str, str]:
    """The variables that torchrun sets for ``rank`` of ``size``, on nodes of ``gpus_per_node`` ranks.

    ``port`` is MASTER_PORT, at the address of this machine, and ``threads`` OMP_NUM_THREADS as it is written there.
    """
    local = rank % gpus_per_node
    values = {
        "RANK": rank,
        "LOCAL_RANK": local,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": min(gpus_per_node, size - rank + local),
        "GROUP_RANK": rank // gpus_per_node,
        "GROUP_WORLD_SIZE": -(-size // gpus_per_node),
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": threads,
    }
    return {name: str(value) for name, value in values.items()}
