"""Ranks of a process world wait for the store of rank 0 as briefly as they can."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from lightrft.sim.current import current_task

__all__ = ["patient", "watch_for_the_store"]

_PAUSE = 0.005


def watch_for_the_store() -> None:
    """Have ``init_process_group`` look for the store again and again in this process.

    Torch tries to connect, and does so again half a second later: with many processes on few cores, rank 0 is rarely
    the first to be there.
    """
    # As an attribute of its package, torch.distributed.rendezvous is a function.
    module: Any = importlib.import_module("torch.distributed.rendezvous")
    module._create_c10d_store = patient(module._create_c10d_store)


def patient(create: Callable[..., Any]) -> Callable[..., Any]:
    """``create``, which makes torch's store; on all ranks but 0, once somebody on this machine listens at its port."""

    def create_store(
        hostname: str, port: int, rank: int, world_size: int, timeout: timedelta, *options: Any, **more: Any
    ) -> Any:
        if rank != 0 and current_task() is None:  # simulated ranks may be run in a process like this one
            end = time.monotonic() + timeout.total_seconds()
            while not _listens(port) and time.monotonic() < end:
                time.sleep(_PAUSE)
        return create(hostname, port, rank, world_size, timeout, *options, **more)

    return create_store


def _listens(port: int) -> bool:
    """Whether a process of this machine listens; a connection that asks would disturb the store for seconds."""
    for name, digits in (("tcp6", 32), ("tcp", 8)):  # torch's store listens on both
        listening = f":{port:04X} {'0' * digits}:0000 0A "
        with contextlib.suppress(FileNotFoundError), open(f"/proc/net/{name}") as table:
            if listening in table.read():
                return True
    return False
