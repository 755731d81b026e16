"""The functions of ``torch.cuda`` and ``torch.accelerator`` that ask for a device, its memory or its random state.

Only the functions that would reach the driver are replaced. What torch builds on them in Python (``memory_summary``,
``torch.cuda.random``, ``torch.cuda.device``, ``torch.cuda.stream``) runs as it is.
"""

from __future__ import annotations

import enum
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightrft.sim.accelerator import memory, streams
from lightrft.sim.accelerator.generators import DefaultGenerators
from lightrft.sim.accelerator.replace import answer, once, wherever_bound
from lightrft.sim.accelerator.state import DeviceState, device_state
from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch

__all__ = ["DeviceProperties", "patches"]


# -- devices ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceProperties:
    """What ``torch.cuda.get_device_properties`` answers: the figures of an H100, with the world's memory size."""

    total_memory: int
    uuid: str
    name: str = "Simulated NVIDIA H100 80GB HBM3"
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 132
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    max_threads_per_block: int = 1024
    max_threads_per_multi_processor: int = 2048
    warp_size: int = 32
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block: int = 49152
    shared_memory_per_block_optin: int = 232448
    shared_memory_per_multiprocessor: int = 233472
    L2_cache_size: int = 52428800
    gcnArchName: str = "Simulated NVIDIA H100 80GB HBM3"  # noqa: N815


def _is_available(state: DeviceState) -> bool:
    return state.cuda_available


def _device_count(state: DeviceState) -> int:
    return state.device_count


def _is_initialized(state: DeviceState) -> bool:
    return state.initialized


def _lazy_init(state: DeviceState) -> None:
    state.initialize()


def _lazy_call(state: DeviceState, call: Callable[[], None], **kind: bool) -> None:
    """Of several seeds set before there is a context only the last one counts."""
    state.call_when_initialized(next(iter(kind), ""), call)


def _current_device(state: DeviceState) -> int:
    return state.use(None)


def _set_device(state: DeviceState, device: Any) -> None:
    """A negative index changes nothing; a device without index is an error, both as in CUDA."""
    index = torch.cuda._utils._get_device_index(device)
    if index >= 0:
        state.initialize()
        state.current_device = index


def _exchange_device(state: DeviceState, index: int) -> int:
    """Select a device and return the one before; -1 and no change for a negative index."""
    if index < 0:
        return -1
    before = state.use(None)
    state.current_device = index
    return before


def _get_device_properties(state: DeviceState, device: Any = None) -> DeviceProperties:
    index = state.index_of(device)
    return DeviceProperties(
        total_memory=state.total_memory, uuid=f"00000000-0000-0000-0000-{state.device_count:06x}{index:06x}"
    )


def _can_device_access_peer(state: DeviceState, device: Any, peer_device: Any) -> bool:
    return state.index_of(device) != state.index_of(peer_device)


def _synchronize(state: DeviceState, device: Any = None) -> None:
    """All work is done, collectives of nccl groups included; the device has to exist."""
    state.index_of(device)
    task = current_task()
    assert task is not None
    for work in list(task.rank.outstanding):
        if work.call.group.backend != "gloo" and not work.call.done:
            work.wait()


def _set_sync_debug_mode(state: DeviceState, debug_mode: int | str) -> None:
    names = ("default", "warn", "error")
    if debug_mode not in (*names, 0, 1, 2):
        raise RuntimeError(f"invalid value of debug_mode {debug_mode!r}, expected one of `default`, `warn`, `error`")
    state.sync_debug_mode = names.index(debug_mode) if isinstance(debug_mode, str) else debug_mode


def _get_sync_debug_mode(state: DeviceState) -> int:
    return state.sync_debug_mode


def _zero(state: DeviceState, *_: Any, **__: Any) -> int:  # noqa: ARG001
    """Load, temperature, power, clock rate, library handles: nothing that a simulation could tell."""
    return 0


def _false(state: DeviceState, *_: Any, **__: Any) -> bool:  # noqa: ARG001
    return False


def _nothing(state: DeviceState, *_: Any, **__: Any) -> None:
    """Accepted; there is nothing to do."""


def _is_bf16_supported(state: DeviceState, including_emulation: bool = True) -> bool:  # noqa: ARG001
    return True


def _nccl_version(state: DeviceState) -> tuple[int, int, int]:  # noqa: ARG001
    return (2, 28, 9)


# -- the runtime library ----------------------------------------------------------------------------------------------


class CudaError(enum.IntEnum):
    """Result codes of :class:`CudaRuntime`."""

    success = 0


class CudaRuntime:
    """What ``torch.cuda.cudart()`` gives a rank. Every call succeeds."""

    cudaError = CudaError  # noqa: N815

    def __init__(self, state: DeviceState) -> None:
        self._state = state

    def cudaMemGetInfo(self, device: int) -> tuple[int, int]:  # noqa: N802
        """Free and total bytes of a device."""
        ledger = self._state.memory(device)
        return ledger.free, ledger.total

    def cudaGetErrorString(self, error: int) -> str:  # noqa: N802
        """The name of a result code."""
        return CudaError(error).name

    def cudaProfilerStart(self) -> CudaError:  # noqa: N802
        """No profiler listens."""
        return CudaError.success

    def cudaProfilerStop(self) -> CudaError:  # noqa: N802
        """No profiler listens."""
        return CudaError.success

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> CudaError:  # noqa: ARG002, N802
        """Host memory needs no registration here."""
        return CudaError.success

    def cudaHostUnregister(self, address: int) -> CudaError:  # noqa: ARG002, N802
        """Host memory needs no registration here."""
        return CudaError.success


def _cudart(state: DeviceState) -> CudaRuntime:
    state.initialize()
    return CudaRuntime(state)


def _check_error(state: DeviceState, res: int) -> None:  # noqa: ARG001
    if int(res) != CudaError.success:
        raise RuntimeError(f"CUDA error {int(res)}")


# -- ranges for a profiler --------------------------------------------------------------------------------------------


def _range_push(state: DeviceState, msg: str) -> int:  # noqa: ARG001
    state.threads.nvtx_depth += 1
    return state.threads.nvtx_depth - 1


def _range_pop(state: DeviceState) -> int:
    """Depth of the range that ends; -2 (NVTX's answer) if there is none."""
    if not state.threads.nvtx_depth:
        return -2
    state.threads.nvtx_depth -= 1
    return state.threads.nvtx_depth


def _range_start(state: DeviceState, msg: str) -> int:  # noqa: ARG001
    return next(state.nvtx_ids)


# -- torch.accelerator ------------------------------------------------------------------------------------------------


def _current_accelerator(state: DeviceState, check_available: bool = False) -> torch.device | None:
    """As a build with CUDA: it knows its accelerator even where none can be reached."""
    return torch.device("cuda") if state.cuda_available or not check_available else None


def _accelerator_memory_stats(state: DeviceState, device_index: Any = None) -> Any:
    return torch.cuda.memory_stats(state.index_of(device_index))


def _accelerator_memory_info(state: DeviceState, device_index: Any = None) -> tuple[int, int]:
    return torch.cuda.mem_get_info(state.index_of(device_index))


def _accelerator_capability(state: DeviceState, device: Any = None) -> dict[str, Any]:
    state.index_of(device)
    names = "float64 float32 float16 bfloat16 complex64 complex128 int64 int32 int16 int8 uint8 bool"
    return {"supported_dtypes": {getattr(torch, name) for name in names.split()}}


def _get_device_module(original: Any) -> Any:
    """Without an argument: ``torch.cuda``, as on a build with CUDA."""

    @functools.wraps(original)
    def get_device_module(device: Any = None) -> Any:
        return torch.cuda if device is None and device_state() is not None else original(device)

    get_device_module.__wrapped__ = original.__wrapped__  # torch.compile looks behind the cache of the original
    return get_device_module


class _DeviceIndex:
    """Stands in for the context manager ``torch.accelerator.device_index``."""

    def __init__(self, state: DeviceState, device: int | None) -> None:
        self._state = state
        self._device = -1 if device is None else device
        self._before = -1

    def __enter__(self) -> None:
        self._before = _exchange_device(self._state, self._device)

    def __exit__(self, *_: object) -> None:
        _exchange_device(self._state, self._before)


# -- what replaces what -----------------------------------------------------------------------------------------------

_ANSWERS: dict[str, dict[str, Callable[..., Any]]] = {
    "torch.cuda": {
        "_exchange_device": _exchange_device,
        "_lazy_call": _lazy_call,
        "_lazy_init": _lazy_init,
        "_maybe_exchange_device": _exchange_device,
        "_sleep": _nothing,
        "can_device_access_peer": _can_device_access_peer,
        "check_error": _check_error,
        "clock_rate": _zero,
        "cudart": _cudart,
        "current_blas_handle": _zero,
        "current_device": _current_device,
        "current_solver_handle": _zero,
        "device_count": _device_count,
        "device_memory_used": memory.device_memory_used,
        "get_device_properties": _get_device_properties,
        "get_sync_debug_mode": _get_sync_debug_mode,
        "ipc_collect": _nothing,
        "is_bf16_supported": _is_bf16_supported,
        "is_available": _is_available,
        "is_initialized": _is_initialized,
        "memory_usage": _zero,
        "power_draw": _zero,
        "set_device": _set_device,
        "set_sync_debug_mode": _set_sync_debug_mode,
        "synchronize": _synchronize,
        "temperature": _zero,
        "utilization": _zero,
    },
    "torch.cuda.memory": memory.ANSWERS,
    "torch.cuda.nvtx": {
        "_device_range_end": _nothing,
        "_device_range_start": _range_start,
        "mark": _nothing,
        "range_end": _nothing,
        "range_pop": _range_pop,
        "range_push": _range_push,
        "range_start": _range_start,
    },
    "torch.cuda.graphs": {"is_current_stream_capturing": _false},
    "torch.cuda.nccl": {"version": _nccl_version},
    "torch.accelerator": {
        "current_accelerator": _current_accelerator,
        "current_device_idx": _current_device,
        "current_device_index": _current_device,
        "current_stream": streams.current_stream,
        "device_index": _DeviceIndex,
        "get_device_capability": _accelerator_capability,
        "set_device_idx": _set_device,
        "set_device_index": _set_device,
        "set_stream": streams.set_stream,
        "synchronize": _synchronize,
    },
    "torch.accelerator.memory": {
        "empty_cache": memory.empty_cache,
        "empty_host_cache": _nothing,
        "get_memory_info": _accelerator_memory_info,
        "memory_stats": _accelerator_memory_stats,
        "reset_accumulated_memory_stats": memory.reset_accumulated_memory_stats,
        "reset_peak_memory_stats": memory.reset_peak_memory_stats,
    },
    "torch._utils": {"_get_current_device_index": _current_device},
}


def _is_built(original: Any) -> Any:
    def is_built() -> bool:
        """Whether torch has CUDA: a world that offers it says so."""
        state = device_state()
        return bool(original()) if state is None else state.cuda_available or bool(original())

    return is_built


def patches() -> list[Patch]:
    """One for every place where torch binds one of the functions above."""
    found: list[Patch] = []
    for module_name, answers in _ANSWERS.items():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError:  # a module that this release of torch does not have
            continue
        package = ".".join(module_name.split(".")[:2])
        found += wherever_bound(module, {name: answer(each) for name, each in answers.items()}, within=package)
    found += wherever_bound(torch, {"get_device_module": once(_get_device_module)})
    found.append(Patch(torch.backends.cuda, "is_built", once(_is_built)))
    # The original is the empty tuple, which is one object in all modules: it must not be taken for an alias.
    found.append(Patch(torch.cuda, "default_generators", once(DefaultGenerators), aliases=False))
    return found
