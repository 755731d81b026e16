"""Parts of torch that look at the device of a tensor, or at whether CUDA is available, and have to be told.

Each replacement says what would go wrong without it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from lightrft.sim.accelerator.replace import answer, answer_or, once, wherever_bound
from lightrft.sim.accelerator.state import DeviceState, device_state
from lightrft.sim.patching import Patch

__all__ = ["patches"]


# -- autocast: CUDA's setting has to reach CPU tensors ----------------------------------------------------------------


def _enter_autocast(original: Any) -> Any:
    """Inside ``autocast("cuda")`` CPU tensors are cast too, with CUDA's default type (float16)."""

    @functools.wraps(original)
    def __enter__(self: Any) -> Any:  # noqa: N807
        entered = original(self)
        if self.device == "cuda" and device_state() is not None:
            self._cpu_before = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
            torch.set_autocast_enabled("cpu", self._enabled)
            torch.set_autocast_dtype("cpu", self.fast_dtype)
        return entered

    return __enter__


def _exit_autocast(original: Any) -> Any:
    @functools.wraps(original)
    def __exit__(self: Any, *error: Any) -> Any:  # noqa: N807
        before = self.__dict__.pop("_cpu_before", None)
        if before is not None:
            torch.set_autocast_enabled("cpu", before[0])
            torch.set_autocast_dtype("cpu", before[1])
        return original(self, *error)

    return __exit__


def _cast(original: Any) -> Any:
    """``custom_fwd(device_type="cuda", cast_inputs=...)`` casts inputs that are on CUDA."""

    @functools.wraps(original)
    def _cast(value: Any, device_type: str, dtype: Any) -> Any:
        return original(value, "cpu" if device_type == "cuda" and device_state() is not None else device_type, dtype)

    return _cast


def _amp_definitely_not_available(state: DeviceState) -> bool:  # noqa: ARG001
    """``autocast("cuda")`` and ``GradScaler("cuda")`` would warn and turn themselves off."""
    return False


def _amp() -> list[Patch]:
    autocast_mode = torch.amp.autocast_mode
    return [
        Patch(autocast_mode.autocast, "__enter__", once(_enter_autocast)),
        Patch(autocast_mode.autocast, "__exit__", once(_exit_autocast)),
        *wherever_bound(autocast_mode, {"_cast": once(_cast)}, within="torch.amp"),
        *wherever_bound(
            torch.cuda.amp.common,
            {"amp_definitely_not_available": answer(_amp_definitely_not_available)},
            within="torch.cuda",
        ),
    ]


# -- activation checkpointing: the device's random state has to be replayed -------------------------------------------


class _InitializedCuda:
    """``torch.cuda`` for ``torch.utils.checkpoint``, which reads whether there is a context from a global flag."""

    _initialized = True

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


_INITIALIZED_CUDA = _InitializedCuda()


def _checkpoint_module(state: DeviceState, original: Any, device: str = "cuda") -> Any:  # noqa: ARG001
    return _INITIALIZED_CUDA if device == "cuda" else original(device)


def _get_device_states(state: DeviceState, *_: Any) -> tuple[list[int], list[torch.Tensor]]:
    """Those of the devices in use: the arguments, on the CPU, do not tell which of them is meant."""
    used = state.generators_in_use() if state.initialized else {}
    return list(used), [generator.pack() for generator in used.values()]


def _checkpointing() -> list[Patch]:
    from torch.utils import checkpoint

    return [
        Patch(checkpoint, "_get_device_module", answer_or(_checkpoint_module)),
        Patch(checkpoint, "get_device_states", answer(_get_device_states)),
        # Asked once per process and kept; other threads find no CUDA tensor and do not come here.
        Patch(checkpoint.DefaultDeviceType, "_default_device_type", lambda _: "cuda"),
    ]


# -- loading and feeding ----------------------------------------------------------------------------------------------


def _validate_device(state: DeviceState, original: Any, location: Any, backend_name: str) -> Any:
    """``torch.load`` of or to a CUDA device asks whether CUDA is available."""
    if backend_name != "cuda":
        return original(location, backend_name)
    index: int | None = torch.device(location).index
    if index is not None and index >= state.device_count:
        raise RuntimeError(
            f"Attempting to deserialize object on CUDA device {index} but torch.cuda.device_count() is "
            f"{state.device_count}. Please use torch.load with map_location to map your storages to an existing device."
        )
    return torch.device("cuda", state.use(index))


def _loader_iterator(original: Any) -> Any:
    """``DataLoader(pin_memory=True)`` would warn and not pin.

    With workers it does not pin here either: the thread that would is not worth its hand-offs.
    """

    @functools.wraps(original)
    def __init__(self: Any, loader: Any) -> None:  # noqa: N807
        if not loader.pin_memory or device_state() is None:
            original(self, loader)
            return
        loader.pin_memory = False
        try:
            original(self, loader)
        finally:
            loader.pin_memory = True
        self._pin_memory = loader.num_workers == 0

    return __init__


# -- distributed training ---------------------------------------------------------------------------------------------


def _ddp(original: Any) -> Any:
    """``DistributedDataParallel(model, device_ids=[i])`` refuses a module on the CPU."""

    @functools.wraps(original)
    def __init__(  # noqa: N807
        self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        state = device_state()
        if state is not None and device_ids is not None and len(device_ids) <= 1:
            for device in (*device_ids, output_device):
                state.index_of(device)
            device_ids = output_device = None
        original(self, module, device_ids, output_device, *args, **kwargs)

    return __init__


# -- profiling --------------------------------------------------------------------------------------------------------


def _profile(original: Any) -> Any:
    """``torch.profiler.profile`` of CUDA activity would warn; what runs is the CPU's."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if kwargs.get("use_device") == "cuda" and device_state() is not None:
            kwargs |= {"use_device": None, "use_cpu": True}
        original(self, *args, **kwargs)

    return __init__


def patches() -> list[Patch]:
    """All of the above."""
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    return [
        *_amp(),
        *_checkpointing(),
        Patch(torch.serialization, "_validate_device", answer_or(_validate_device)),
        Patch(_BaseDataLoaderIter, "__init__", once(_loader_iterator)),
        Patch(torch.autograd.profiler.profile, "__init__", once(_profile)),
        Patch(DistributedDataParallel, "__init__", once(_ddp)),
    ]
