"""Which ranks belong together: inference engines, sequence parallelism, data parallelism."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

__all__ = ["ParallelGroups"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelGroups:
    """The groups of one rank. Every rank makes all of them, in the same order.

    Attributes:
        engine_mp: consecutive ranks that share one inference engine; ``None`` if the process is alone.
        engine_dp: ranks with the same place in their engines.
        sp: consecutive ranks that share each sequence; ``None`` if ``sp_size`` is 1.
        sp_size: ranks of ``sp``.
        dp_rank: which share of the data is this rank's: the same for all ranks of ``sp``.
        dp_size: how many shares there are.
        engine_tp_size: ranks of ``engine_mp``.
    """

    engine_mp: dist.ProcessGroup | None
    engine_dp: dist.ProcessGroup | None
    sp: dist.ProcessGroup | None
    sp_size: int
    dp_rank: int
    dp_size: int
    engine_tp_size: int

    @classmethod
    def make(cls, world_size: int, rank: int, *, sp_size: int, engine_tp_size: int) -> ParallelGroups:
        """Make the groups. *Collective*.

        Args:
            world_size: of the default group; ``sp_size`` and ``engine_tp_size`` divide it.
            rank: in the default group.
            sp_size: ranks that share a sequence.
            engine_tp_size: ranks that share an engine.
        """
        alone = not dist.is_initialized()
        engines = _blocks(world_size, engine_tp_size)
        return cls(
            engine_mp=None if alone else _own(engines, rank),
            engine_dp=None if alone else _own(_strides(engines), rank),
            sp=None if alone or sp_size == 1 else _own(_blocks(world_size, sp_size), rank),
            sp_size=sp_size,
            dp_rank=rank // sp_size,
            dp_size=world_size // sp_size,
            engine_tp_size=engine_tp_size,
        )


def _blocks(world_size: int, size: int) -> list[list[int]]:
    return [list(range(first, first + size)) for first in range(0, world_size, size)]


def _strides(blocks: list[list[int]]) -> list[list[int]]:
    return [list(ranks) for ranks in zip(*blocks, strict=True)]


def _own(several: list[list[int]], rank: int) -> dist.ProcessGroup:
    """Make a group of each list of ranks; the one with ``rank`` in it."""
    groups = {tuple(ranks): dist.new_group(ranks) for ranks in several}
    own: dist.ProcessGroup = next(group for ranks, group in groups.items() if rank in ranks)
    return own
