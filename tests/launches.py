"""Launches of torchrun, which keeps its ranks in sessions of their own."""

import contextlib

import psutil


def kill_with_children(process):
    """End a launch and its ranks, which hold its pipes."""
    if process.poll() is None:
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.communicate(timeout=30)
