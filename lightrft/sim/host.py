"""What a run changes in the process that hosts it, each as a context that puts it back."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lightrft.sim import (
    accelerator,
    cached_properties,
    clock,
    groups,
    loggers,
    outside,
    profiling,
    shared_globals,
    store,
    threads,
)
from lightrft.sim.patching import Patch, Patcher

__all__ = ["one_core", "patched", "same_parallelism", "stack_size"]


def _all_patches() -> list[Patch]:
    parts = (cached_properties, clock, threads, outside, store, groups, profiling, shared_globals, loggers, accelerator)
    return [patch for part in parts for patch in part.patches()]


@contextmanager
def patched() -> Iterator[None]:
    """Everything that simulated ranks must not reach for real is replaced."""
    patcher = Patcher()
    try:
        patcher.apply(_all_patches())
        patcher.replace_aliases()
        yield
    finally:
        patcher.restore()


@contextmanager
def same_parallelism() -> Iterator[None]:
    """The number of threads that torch's operations use is afterwards what it was."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def stack_size(size: int) -> Iterator[None]:
    """Threads started inside have stacks of ``size`` bytes."""
    previous = threading.stack_size(size)
    try:
        yield
    finally:
        threading.stack_size(previous)


@contextmanager
def one_core() -> Iterator[None]:
    """Threads started inside stay on one core: a hand-off then costs less, and only one runs anyway."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed, policy = os.sched_getaffinity(0), os.sched_getscheduler(0)
    threads.host_cores.update(allowed)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    cores = sorted(allowed)
    chosen = cores[int(worker[2:]) % len(cores)] if worker[2:].isdigit() else cores[os.getpid() % len(cores)]
    os.sched_setaffinity(0, {chosen})
    if policy == os.SCHED_OTHER:  # a woken batch thread does not preempt its waker, who still holds the interpreter
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, os.sched_param(0))
        os.sched_setaffinity(0, allowed)
