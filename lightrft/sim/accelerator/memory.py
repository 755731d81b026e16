"""The memory that a rank's devices report.

Real tensors are not counted: they live in host memory, and when they go depends on Python's collector. A ledger holds
only what somebody charges to it, so its numbers are the same in every run; it is empty until then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightrft.sim.accelerator.state import DeviceState

__all__ = ["ANSWERS", "MemoryLedger"]


@dataclass(slots=True)
class MemoryLedger:
    """Bytes on one device, counted as CUDA's caching allocator counts: what is freed stays reserved.

    Args:
        total: bytes on the device.
        index: the device, for messages.
    """

    total: int
    index: int = 0
    fraction: float = 1.0
    """The share of ``total`` that may be charged, see ``torch.cuda.set_per_process_memory_fraction``."""
    allocated: int = field(default=0, init=False)
    peak_allocated: int = field(default=0, init=False)
    reserved: int = field(default=0, init=False)
    peak_reserved: int = field(default=0, init=False)
    ever_allocated: int = field(default=0, init=False)
    ever_freed: int = field(default=0, init=False)
    ooms: int = field(default=0, init=False)

    @property
    def free(self) -> int:
        """Bytes that are not reserved."""
        return self.total - self.reserved

    def charge(self, nbytes: int) -> None:
        """Allocate ``nbytes``.

        Raises:
            torch.OutOfMemoryError: there are not so many left.
        """
        if self.allocated + nbytes > self.total * self.fraction:
            self.ooms += 1
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes} bytes. Simulated GPU {self.index} has a total "
                f"capacity of {self.total} bytes of which {self.total - self.allocated} bytes are free; this process "
                f"may use {self.fraction:.0%} of it."
            )
        self.allocated += nbytes
        self.ever_allocated += nbytes
        self.reserved = max(self.reserved, self.allocated)
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def release(self, nbytes: int) -> None:
        """Free ``nbytes`` of what was charged; they stay reserved until :meth:`empty_cache`."""
        if nbytes > self.allocated:
            raise ValueError(f"cannot release {nbytes} bytes: only {self.allocated} are charged to device {self.index}")
        self.allocated -= nbytes
        self.ever_freed += nbytes

    def empty_cache(self) -> None:
        """Give reserved memory that is not allocated back to the device."""
        self.reserved = self.allocated

    def reset_peaks(self) -> None:
        """Start the peaks anew at the present values."""
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def reset_accumulated(self) -> None:
        """Start the historical totals anew at zero."""
        self.ever_allocated = self.ever_freed = self.ooms = 0

    def statistics(self) -> dict[str, Any]:
        """As ``torch.cuda.memory_stats_as_nested_dict``; what the ledger does not know is zero."""
        used = _statistic(self.allocated, self.peak_allocated, self.ever_allocated, self.ever_freed)
        held = _statistic(self.reserved, self.peak_reserved, self.peak_reserved, self.peak_reserved - self.reserved)
        known = dict.fromkeys(("allocated_bytes", "active_bytes", "requested_bytes"), used) | {"reserved_bytes": held}
        pools = {name: _pools(known.get(name)) for name in _BY_POOL}
        counters = dict.fromkeys(_COUNTERS, 0) | {"num_ooms": self.ooms, "max_split_size": -1}
        return pools | {name: _statistic(0, 0, 0, 0) for name in _WITHOUT_POOLS} | counters


_BY_POOL = (
    "allocation",
    "segment",
    "active",
    "inactive_split",
    "allocated_bytes",
    "reserved_bytes",
    "active_bytes",
    "inactive_split_bytes",
    "requested_bytes",
)
_WITHOUT_POOLS = ("oversize_allocations", "oversize_segments")
_COUNTERS = ("num_alloc_retries", "num_sync_all_streams", "num_device_alloc", "num_device_free")


def _statistic(current: int, peak: int, allocated: int, freed: int) -> dict[str, int]:
    return {"current": current, "peak": peak, "allocated": allocated, "freed": freed}


def _pools(everything: dict[str, int] | None) -> dict[str, dict[str, int]]:
    """Large blocks stand for all that is charged: a ledger knows no small ones."""
    nothing = _statistic(0, 0, 0, 0)
    return {"all": everything or nothing, "large_pool": everything or nothing, "small_pool": nothing}


# -- what torch.cuda.memory asks --------------------------------------------------------------------------------------


def _memory_stats_as_nested_dict(state: DeviceState, device: Any = None) -> dict[str, Any]:
    return state.memory(state.index_of(device)).statistics() if state.initialized else {}


def reset_peak_memory_stats(state: DeviceState, device: Any = None) -> None:
    """``torch.cuda.reset_peak_memory_stats``."""
    state.memory(state.index_of(device)).reset_peaks()


def reset_accumulated_memory_stats(state: DeviceState, device: Any = None) -> None:
    """``torch.cuda.reset_accumulated_memory_stats``."""
    state.memory(state.index_of(device)).reset_accumulated()


def empty_cache(state: DeviceState) -> None:
    """``torch.cuda.empty_cache``."""
    state.memory().empty_cache()


def _set_memory_fraction(state: DeviceState, fraction: float, device: Any = None) -> None:
    if not isinstance(fraction, float):
        raise TypeError("Invalid type for fraction argument, must be `float`")
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")
    state.memory(state.index_of(device)).fraction = fraction


def _get_memory_fraction(state: DeviceState, device: Any = None) -> float:
    return state.memory(state.index_of(device)).fraction


def device_memory_used(state: DeviceState, device: Any = None) -> int:
    """``torch.cuda.device_memory_used``."""
    return state.memory(state.index_of(device)).reserved


def _empty_list(state: DeviceState, *_: Any, **__: Any) -> list[Any]:  # noqa: ARG001
    return []


def _empty_dict(state: DeviceState, *_: Any, **__: Any) -> dict[str, Any]:  # noqa: ARG001
    return {}


def _snapshot(state: DeviceState, *_: Any, **__: Any) -> dict[str, Any]:  # noqa: ARG001
    return {"segments": [], "device_traces": [[]], "allocator_settings": {}, "external_annotations": []}


def _list_gpu_processes(state: DeviceState, device: Any = None) -> str:
    return f"GPU:{state.index_of(device)}\nno processes are running"


def _allocator_backend(state: DeviceState) -> str:  # noqa: ARG001
    return "native"


def _nothing(state: DeviceState, *_: Any, **__: Any) -> None:
    """Accepted; there is nothing to do."""


ANSWERS: dict[str, Callable[..., Any]] = {
    "_dump_snapshot": _nothing,
    "_record_memory_history": _nothing,
    "_snapshot": _snapshot,
    "caching_allocator_enable": _nothing,
    "empty_cache": empty_cache,
    "get_allocator_backend": _allocator_backend,
    "get_per_process_memory_fraction": _get_memory_fraction,
    "host_memory_stats": _empty_dict,
    "host_memory_stats_as_nested_dict": _empty_dict,
    "list_gpu_processes": _list_gpu_processes,
    "memory_snapshot": _empty_list,
    "memory_stats_as_nested_dict": _memory_stats_as_nested_dict,
    "reset_accumulated_host_memory_stats": _nothing,
    "reset_accumulated_memory_stats": reset_accumulated_memory_stats,
    "reset_peak_host_memory_stats": _nothing,
    "reset_peak_memory_stats": reset_peak_memory_stats,
    "set_per_process_memory_fraction": _set_memory_fraction,
}
"""By name in ``torch.cuda.memory``: the function that answers on a rank."""
