"""Runs a function on simulated ranks that have a group; and names of collectives that torch 2.13 changed."""

import torch.distributed as dist

from lightrft.sim import SimWorld

__all__ = ["all_gather_single", "on_ranks", "reduce_scatter_single", "results_and_collectives"]

# torch 2.11 and 2.12 know the old names only
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def on_ranks(size, body, *, backend="gloo", **options):
    """Run ``body()`` on ``size`` ranks that have a group; what it returns, by rank."""
    return SimWorld(size, **options).run(_with_group, body, backend)


def results_and_collectives(size, body, **options):
    """The same, and the names of the collectives of rank 0."""
    world = SimWorld(size, stall_limit=15, **options)
    results = world.run(_with_group, body, "gloo")
    return results, [event.operation for event in world.trace if event.rank == 0]


def _with_group(body, backend):
    dist.init_process_group(backend)
    result = body()
    dist.destroy_process_group()
    return result
