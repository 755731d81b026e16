"""The ``torch.cuda`` calls that a trainer makes, answered on a machine without CUDA.

Inside a world a rank sees the devices of a node: it can select one, create streams on it, seed it, ask for its memory,
and put tensors on it, which stay in host memory. Threads outside the world find torch as it is.

Not answered: ``torch.device(0)`` (write ``torch.device("cuda", 0)``), CUDA graphs, memory pools, external streams, IPC
handles, ``torch.cuda.comm``, ``SyncBatchNorm``, FSDP1, and operators called through ``torch.ops`` with a CUDA device.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lightrft.sim.accelerator import late_imports, libraries, runtime, streams, tensors
from lightrft.sim.accelerator.state import DeviceState

if TYPE_CHECKING:
    from lightrft.sim.patching import Patch

__all__ = ["DeviceState", "patches"]


@cache
def patches() -> list[Patch]:
    """Everything to install for the time of a run; built once, while nothing is installed."""
    found = [*runtime.patches(), *streams.patches(), *tensors.patches(), *libraries.patches()]
    return [*found, *late_imports.patches(found)]
