"""FSDP2 and DTensor on a mesh of CUDA devices whose tensors are on the CPU.

Their modules take most of a second to import, so they are patched only where a program imports them: see
:mod:`lightrft.sim.accelerator.late_imports`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightrft.sim.accelerator.generators import PhiloxState
from lightrft.sim.accelerator.replace import answer_or, once
from lightrft.sim.accelerator.state import CPU, DeviceState, device_state

__all__ = ["IMPORTERS", "MAKERS"]


# -- FSDP2 ------------------------------------------------------------------------------------------------------------


def _device_from_mesh(state: DeviceState, original: Any, mesh: Any) -> torch.device:  # noqa: ARG001
    """FSDP2 compares its parameters' device with that of the mesh."""
    device: torch.device = original(mesh)
    return CPU if device.type == "cuda" else device


def _default_mesh(state: DeviceState, original: Any, **kwargs: Any) -> Any:  # noqa: ARG001
    """``fully_shard(model)`` without a mesh: over CUDA devices, as in a build with CUDA."""
    from torch.distributed import distributed_c10d
    from torch.distributed.device_mesh import init_device_mesh

    if not distributed_c10d.is_initialized():
        distributed_c10d.init_process_group()
    return init_device_mesh("cuda", (distributed_c10d.get_world_size(),), **kwargs)


# -- random operations on DTensors ------------------------------------------------------------------------------------


def _tracker_init(original: Any) -> Any:
    """DTensor's random operations want CUDA to be available."""

    @functools.wraps(original)
    def __init__(self: Any, device: torch.device) -> None:  # noqa: N807
        if device.type != "cuda" or device_state() is None:
            original(self, device)
            return
        self._device = device
        self._device_handle = torch.cuda
        self._use_distribute_region = True

    return __init__


def _distribute_region(original: Any) -> Any:
    """DTensor sets the device's random state for an operation on local tensors, which draw from the CPU's generator.

    So that generator is restarted from the device's state: replicas draw the same numbers, shards different ones.
    """

    @contextmanager
    def _distribute_region(self: Any, spec: Any, generator: Any = None) -> Iterator[None]:
        state = device_state()
        if state is None or self._device.type != "cuda":
            with original(self, spec, generator):
                yield
        elif generator is not None:
            with torch.random.fork_rng(devices=[], device_type="cuda"):
                drawn = int(torch.randint(1 << 62, (), generator=generator))
                torch.default_generator.manual_seed(_seed_of_shard(self, spec, drawn))
                yield
        else:
            with original(self, spec, None):
                if self._use_distribute_region:
                    torch.default_generator.manual_seed(state.generator().stream_seed())
                yield

    return _distribute_region


def _seed_of_shard(tracker: Any, spec: Any, seed: int) -> int:
    """The seed with which this rank's shard of ``spec`` draws, given the one that all ranks have drawn."""
    from torch.distributed.tensor import _random

    packed = _random._PhiloxState(PhiloxState(seed).pack())
    tracker._set_pre_op_offset(packed, spec)
    philox = PhiloxState()
    philox.unpack(packed.state)
    return philox.stream_seed()


class _RandomOfRank:
    """``torch.distributed.tensor._random`` as the modules that use it see it: with one tracker for each rank.

    A tracker is made, with a broadcast, at a rank's first random operation; one for all would let some ranks skip it.
    """

    def __init__(self, module: Any) -> None:
        vars(self)["_module"] = module

    def __getattr__(self, name: str) -> Any:
        state = device_state()
        if name == "_rng_tracker" and state is not None:
            return state.dtensor_tracker
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        state = device_state()
        if name == "_rng_tracker" and state is not None:
            state.dtensor_tracker = value
        else:
            setattr(self._module, name, value)


# -- what replaces what -----------------------------------------------------------------------------------------------

_FSDP = "torch.distributed.fsdp._fully_shard"
_TENSOR = "torch.distributed.tensor"

MAKERS: dict[str, dict[str, Callable[[Any], Any]]] = {
    f"{_FSDP}._fsdp_init": {
        "_get_device_from_mesh": answer_or(_device_from_mesh),
        "_init_default_mesh": answer_or(_default_mesh),
    },
    f"{_TENSOR}._random": {
        "_RNGStateTracker.__init__": once(_tracker_init),
        "OffsetBasedRNGTracker._distribute_region": once(_distribute_region),
    },
    f"{_TENSOR}._api": {"random": once(_RandomOfRank)},
    f"{_TENSOR}._dispatch": {"random": once(_RandomOfRank)},
}
"""By module: what to replace in it, and with what."""

IMPORTERS = {f"{_FSDP}._fsdp_init": (f"{_FSDP}._fully_shard", "torch.distributed._composable.replicate_with_fsdp")}
"""By module: the modules that import what is replaced in it by name."""
