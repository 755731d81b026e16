"""What a check of strategies gets: how to run a function with a strategy on ranks."""

from __future__ import annotations

import os
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from unittest import SkipTest

import torch.distributed as dist

from lightrft.sim.contracts.findings import refused
from lightrft.strategy import get_strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from lightrft.strategy.strategy_base import StrategyBase

__all__ = ["Make", "Subject", "refused"]


class World(Protocol):
    """N ranks that run one function, as ``SimWorld`` and ``ProcessWorld`` are."""

    def run(self, fn: Callable[..., Any], /, *args: Any) -> list[Any]:
        """Run ``fn`` on every rank, with the variables of torchrun set; what it returned, by rank."""


class Make:
    """Makes strategies on one rank: ``make(max_norm=0.0)``.

    Args:
        settings: what chooses the implementation under check.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = dict(settings)

    @property
    def world_size(self) -> int:
        """Ranks, also before there is a process group."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    def __call__(self, **more: Any) -> StrategyBase:
        """A strategy with ``more`` settings, one sequence of each rank in a step unless they say otherwise."""
        batch = {} if "train_batch_size" in more else {"train_batch_size": self.world_size // more.get("sp_size", 1)}
        return get_strategy({**self._settings, **batch, **more})


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An implementation of strategies.

    Attributes:
        world: makes a world of so many ranks.
        settings: what chooses the implementation, such as ``{"fsdp": True}``.
        name: how messages call it.
        size: how many ranks the checks have.
        lacks: capabilities that it does not have, each with the reason.
    """

    world: Callable[[int], World]
    settings: Mapping[str, Any]
    name: str
    size: int = 2
    lacks: Mapping[str, str] = field(default_factory=dict)

    def run(self, program: Callable[..., Any], *args: Any, size: int | None = None) -> list[Any]:
        """Run ``program(make, *args)`` on every rank; what it returned, by rank.

        Args:
            program: what each rank does, with a ``Make``.
            args: the same for all ranks.
            size: how many ranks, if not the usual number.
        """
        return self.world(size or self.size).run(_on_rank, program, Make(self.settings), args)

    def needs(self, least: int) -> None:
        """Skip the check where there are fewer ranks."""
        if self.size < least:
            raise SkipTest(f"needs {least} ranks")

    @contextmanager
    def folder(self) -> Iterator[str]:
        """A folder that all ranks see, gone afterwards; in memory where the system has such a place."""
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
            yield path


def _on_rank(program: Callable[..., Any], make: Make, args: tuple[Any, ...]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries; checks that want one record it
        try:
            return program(make, *args)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
