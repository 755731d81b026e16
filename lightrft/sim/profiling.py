"""``torch.profiler`` keeps one profile per process: in a world one rank may use it, and a second one is refused."""

from __future__ import annotations

import functools
from typing import Any

from torch.autograd import profiler

from lightrft.errors import RefusedError
from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch

__all__ = ["patches"]


def _one_rank(original: Any) -> Any:
    @functools.wraps(original)
    def begin(*args: Any, **kwargs: Any) -> Any:
        task = current_task()
        if task is not None:
            world, index = task.rank.world, task.rank.index
            if world.profiled is None:
                world.profiled = index
            elif world.profiled != index:
                raise RefusedError(
                    f"torch.profiler keeps one profile per process, and rank {world.profiled} of this world uses it: "
                    "profile one rank, for example `if dist.get_rank() == 0`"
                )
        return original(*args, **kwargs)

    return begin


_PATCHES = [Patch(profiler, name, _one_rank) for name in ("_prepare_profiler", "_enable_profiler")]


def patches() -> list[Patch]:
    """The replacements inside torch's profiler."""
    return _PATCHES
