"""How much memory a rank uses, and giving back what it does not."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path

import torch

__all__ = ["memory_report", "sync_and_clear_cache"]

_GIB = 1 << 30


def memory_report(prefix: str = "", device: torch.device | str = "cpu") -> str:
    """What ``device`` has in use, in one line; where it is no CUDA device, what this process has in host memory.

    Args:
        prefix: begins the line, such as the name of a stage.
        device: the rank's device.

    Returns:
        a line such as ``after generate: cuda:0 allocated 1.50 GiB, reserved 2.00 GiB, peak 1.75 GiB``, where the peak
        is that of what was allocated; or ``after generate: host memory 0.50 GiB, peak 0.62 GiB``.
    """
    device = torch.device(device)
    if device.type == "cuda":
        parts = {
            f"{device} allocated": torch.cuda.memory_allocated(device),
            "reserved": torch.cuda.memory_reserved(device),
            "peak": torch.cuda.max_memory_allocated(device),
        }
    else:
        parts = {"host memory": _resident(), "peak": _peak_resident()}
    text = ", ".join(f"{name} {size / _GIB:.2f} GiB" for name, size in parts.items())
    return f"{prefix}: {text}" if prefix else text


def sync_and_clear_cache(device: torch.device | str = "cpu") -> None:
    """Wait for the work of ``device``, collect garbage, and give cached memory back to the driver."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _resident() -> int:
    """Bytes of this process that lie in memory; where there is no ``/proc``, the most there ever were."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return _peak_resident()
    return pages * resource.getpagesize()


def _peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10  # bytes there, KiB everywhere else
