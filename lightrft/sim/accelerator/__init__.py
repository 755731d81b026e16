"""The ``torch.cuda`` calls that a trainer makes, answered on a machine without CUDA.

Inside a world a rank sees the devices of a node: it can select one, create streams on it, seed it, ask for its memory,
and put tensors on it, which stay in host memory. Threads outside the world find torch as it is.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lightrft.sim.accelerator import dtensor, libraries, runtime, streams, tensors
from lightrft.sim.accelerator.state import DeviceState

if TYPE_CHECKING:
    from lightrft.sim.patching import Patch

__all__ = ["DeviceState", "patches"]


@cache
def patches() -> list[Patch]:
    """Everything to install for the time of a run; built once, while nothing is installed."""
    return [*runtime.patches(), *streams.patches(), *tensors.patches(), *libraries.patches(), *dtensor.patches()]
