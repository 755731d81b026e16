"""What one rank's process knows of its devices: the current one, streams, memory, random state.

Nothing here touches torch's own state. Tensors stay in host memory; a device is a number, a ledger and a counter.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lightrft.sim.accelerator.generators import PhiloxState
from lightrft.sim.accelerator.memory import MemoryLedger
from lightrft.sim.current import current_task

if TYPE_CHECKING:
    from lightrft.sim.accelerator.streams import Stream

__all__ = ["CPU", "CUDA_DEVICES", "GIBIBYTE", "DeviceState", "device_state"]

CPU = torch.device("cpu")
GIBIBYTE = 1 << 30

_DEVICE_INDICES = 128
"""``torch.device`` keeps an index in 7 bits."""
CUDA_DEVICES: dict[Any, int | None] = {"cuda": None, torch.device("cuda"): None}
"""Every CUDA device, as a string and as a ``torch.device``, with its index: faster than to ask ``device.type``."""
for _index in range(_DEVICE_INDICES):
    CUDA_DEVICES[f"cuda:{_index}"] = CUDA_DEVICES[torch.device("cuda", _index)] = _index


class _PerThread(threading.local):
    """CUDA keeps these per thread: a new thread starts on device 0 and on the default streams."""

    def __init__(self) -> None:
        self.device = 0
        self.streams: dict[int, Stream] = {}
        self.nvtx_depth = 0


@dataclass(slots=True)
class DeviceState:
    """The devices of one node as one rank's process sees them; one object per rank.

    Args:
        local_rank: the rank's place on its node. The current device of a new process is 0 nevertheless.
        device_count: devices on the node.
        total_memory: bytes per device.
        cuda_available: what ``torch.cuda.is_available()`` answers.
    """

    local_rank: int
    device_count: int = 1
    total_memory: int = 80 * GIBIBYTE
    cuda_available: bool = False
    initialized: bool = field(default=False, init=False)
    """Whether this process has a CUDA context: set by the first call that needs one."""
    sync_debug_mode: int = field(default=0, init=False)
    dtensor_tracker: Any = field(default=None, init=False, repr=False)
    """The random state tracker that DTensor has made on this rank."""
    stream_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1), init=False, repr=False)
    nvtx_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1), init=False, repr=False)
    threads: _PerThread = field(default_factory=_PerThread, init=False, repr=False)
    _memory: dict[int, MemoryLedger] = field(default_factory=dict, init=False, repr=False)
    _generators: dict[int, PhiloxState] = field(default_factory=dict, init=False, repr=False)
    _pending: list[tuple[str, Callable[[], None]]] = field(default_factory=list, init=False, repr=False)

    @property
    def current_device(self) -> int:
        """Index of the device that the calling thread has selected; 0 until it selects one."""
        return self.threads.device

    @current_device.setter
    def current_device(self, index: int) -> None:
        self.threads.device = self.checked(index)

    def checked(self, index: int) -> int:
        """``index`` itself.

        Raises:
            torch.AcceleratorError: there is no such device; CUDA's error for it.
        """
        if 0 <= index < self.device_count:
            return index
        raise torch.AcceleratorError(
            f"CUDA error: invalid device ordinal: got {index}, but this rank (local rank {self.local_rank}) sees "
            f"{self.device_count} device(s), numbered from 0. Choose a device by the local rank, not by the global one."
        )

    def initialize(self) -> None:
        """Create the CUDA context: run what waited for it, in the order in which it was asked for."""
        if not self.initialized:
            self.initialized = True
            pending, self._pending = self._pending, []
            for _, call in pending:
                call()

    def call_when_initialized(self, kind: str, call: Callable[[], None]) -> None:
        """Run ``call`` now, or once there is a context; of one ``kind`` other than ``""`` only the last call waits."""
        if self.initialized:
            call()
            return
        if kind:
            self._pending = [waiting for waiting in self._pending if waiting[0] != kind]
        self._pending.append((kind, call))

    def use(self, index: int | None) -> int:
        """The device with this index (``None``: the current one), after making sure that there is a context."""
        if not self.initialized:
            self.initialize()
        return self.threads.device if index is None else self.checked(index)

    def place(self, device: Any) -> Any:
        """Where a tensor goes that was asked to be on ``device``: the CPU for a CUDA device, else ``device`` itself.

        Args:
            device: what torch takes for a device: a string, a ``torch.device``, an index, or ``None``.
        """
        kind = type(device)
        if kind is torch.device or kind is str:
            if device not in CUDA_DEVICES:
                return device
            self.use(CUDA_DEVICES[device])
        elif kind is int and device >= 0:
            self.use(device)
        else:
            return device
        return CPU

    def index_of(self, device: Any) -> int:
        """Index of a CUDA device given as torch's CUDA functions take it; ``None`` is the current one.

        Raises:
            ValueError: it is a device of another kind.
            torch.AcceleratorError: there is no such device.
        """
        if device is None or type(device) is int:
            return self.use(device)
        if type(device) in (torch.device, str) and device in CUDA_DEVICES:
            return self.use(CUDA_DEVICES[device])
        if isinstance(device, torch.cuda.device):
            return self.use(device.idx)
        found = torch.device(device)
        if found.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {found}")
        return self.use(found.index)

    def memory(self, index: int | None = None) -> MemoryLedger:
        """The ledger of a device (``None``: the current one)."""
        index = self.threads.device if index is None else self.checked(index)
        ledger = self._memory.get(index)
        if ledger is None:
            ledger = self._memory[index] = MemoryLedger(self.total_memory, index)
        return ledger

    def generator(self, index: int | None = None) -> PhiloxState:
        """The random state of a device (``None``: the current one)."""
        index = self.threads.device if index is None else self.checked(index)
        generator = self._generators.get(index)
        if generator is None:
            generator = self._generators[index] = PhiloxState()
        return generator

    def generators_in_use(self) -> dict[int, PhiloxState]:
        """The random states, by index, of the current device and of those that were seeded or drawn from."""
        self.generator()
        return dict(self._generators)


def device_state() -> DeviceState | None:
    """The state of the rank that the calling thread belongs to; ``None`` outside a world."""
    task = current_task()
    if task is None:
        return None
    state: DeviceState = task.rank.accelerator
    return state
