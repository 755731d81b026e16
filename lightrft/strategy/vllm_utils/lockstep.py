"""Ranks that compute together: one that fails alone, while the others wait for it inside of vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightrft.errors import LostRanksError

if TYPE_CHECKING:
    from lightrft.strategy.utils.agreement import Ranks

__all__ = ["Lockstep"]

_PATIENCE = 60.0
"""Seconds in which ranks that fail alike have all failed, each after at most one more pass through the model."""

_INTERVAL = 0.05
"""Seconds between two looks at the others."""


class Lockstep:
    """Notes in the store of the default group which calls a rank has left, so that one that fails knows who waits.

    A rank that waits in a collective of vLLM for one that has failed cannot be told: it waits in a kernel, or in a loop
    of C++ without end. So the rank that has failed must not wait for it either.

    Args:
        ranks: that compute together. All of them make this, and agree that they have before the first call.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._rank = ranks.rank
        self._others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
        self._store: Any = None
        if self._others:
            members = "-".join(str(rank) for rank in dist.get_process_group_ranks(ranks.group))
            store = dist.distributed_c10d._get_default_store()
            self._store = dist.PrefixStore(f"lightrft/vllm/{members}", store)  # type: ignore[attr-defined]
            self._leave(0)

    @contextmanager
    def call(self, number: int) -> Iterator[None]:
        """A call in which ranks wait for each other.

        Args:
            number: of the call, counted from 1, the same on all ranks.

        Raises:
            LostRanksError: it failed here, and others have not left it a minute later.
        """
        try:
            yield
        except Exception as error:
            self._leave(number)
            behind = self._still_in(number)
            if behind:
                raise LostRanksError(
                    f"vLLM failed on rank {self._rank} of its group ({type(error).__name__}: {error}), and rank "
                    f"{', '.join(map(str, behind))} waits for it in a collective, where no error arrives: end this "
                    "process, so that the launcher ends the others"
                ) from error
            raise
        self._leave(number)

    def _leave(self, number: int) -> None:
        if self._store is not None:
            self._store.set(str(self._rank), str(number))

    def _still_in(self, number: int) -> list[int]:
        """The ranks that have not left a call when patience ends."""
        until = time.monotonic() + _PATIENCE
        while behind := [rank for rank in self._others if int(self._store.get(str(rank))) < number]:
            if time.monotonic() > until:
                return behind
            time.sleep(_INTERVAL)
        return []
