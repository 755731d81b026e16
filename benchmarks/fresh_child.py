"""What has to be measured in a fresh process: ``python -m benchmarks.fresh_child NAME``; prints JSON.

Memory is the growth of this process's resident memory; a process that has run other benchmarks has freed memory to
reuse, and would show too little.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.groups import Body, now, resident_mib, simulated, threaded

RANKS = 1024
WORLDS = 1000
SETTLED = 100
"""Worlds after which nothing may grow any more."""

Run = Callable[[int, Body], list[Any]]


def start_and_end(run: Run) -> dict[str, float]:
    """Seconds in which 1024 ranks start, make a group, meet in a barrier and end; and memory while all are alive."""
    run(4, lambda _: None)  # loads what is loaded once
    gc.collect()
    before = resident_mib()
    alive: list[float] = []

    def meet(rank: int) -> None:
        dist.barrier()
        if rank == 0:
            alive.append(resident_mib())

    first, later = (_seconds(lambda: run(RANKS, meet)) for _ in range(2))
    return {"first": first, "later": later, "mib_per_rank": (alive[0] - before) / RANKS}


def _seconds(action: Callable[[], object]) -> float:
    begin = now()
    action()
    return now() - begin


def many_worlds() -> dict[str, float]:
    """1,000 worlds of 4 ranks: time, and what has grown between the 100th and the last."""
    tensors = [torch.ones(16) for _ in range(4)]

    def run(worlds: int) -> None:
        for _ in range(worlds):
            simulated(4, lambda rank: dist.all_reduce(tensors[rank].fill_(1)))

    run(SETTLED)
    settled = _footprint()
    seconds = _seconds(lambda: run(WORLDS - SETTLED)) / (WORLDS - SETTLED)
    growth = {key: value - settled[key] for key, value in _footprint().items()}
    return {"seconds": seconds, **growth}


def _footprint() -> dict[str, float]:
    gc.collect()
    return {
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "objects": len(gc.get_objects()),
        "blocks": sys.getallocatedblocks(),
        "mib": resident_mib(),
    }


NAMES: dict[str, Callable[[], dict[str, float]]] = {
    "simulated": lambda: start_and_end(simulated),
    "threaded": lambda: start_and_end(threaded),
    "worlds": many_worlds,
}

if __name__ == "__main__":
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    print(json.dumps(NAMES[sys.argv[1]]()))
