"""Tensors that are asked to be on a CUDA device, or in pinned memory, and stay in host memory.

``t.device`` is the CPU and ``t.is_cuda`` is False; ``x.to("cuda")`` is ``x`` itself, as ``x.to("cpu")`` is. Pinning
copies, as on a real machine, and ``is_pinned`` answers yes for the copy and everything that shares its storage.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from lightrft.sim.accelerator.generators import DeviceGenerator
from lightrft.sim.accelerator.replace import RankClass, answer, once
from lightrft.sim.accelerator.state import CPU, CUDA_DEVICES, DeviceState
from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch

__all__ = ["patches"]

_Tensor = torch.Tensor
_device = torch.device


# -- factories --------------------------------------------------------------------------------------------------------


def _factory(original: Any) -> Any:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs or "pin_memory" in kwargs:
            task = current_task()
            if task is not None:
                return _create(original, task.rank.accelerator, args, kwargs)
        return original(*args, **kwargs)

    _tell_torchscript(original, factory)
    return factory


def _create(original: Any, state: DeviceState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    pinned = kwargs.pop("pin_memory", False)
    device = kwargs.get("device")
    placed = state.place(device)
    if placed is not device:
        if pinned:
            raise RuntimeError(f"Only dense CPU tensors can be pinned: got pin_memory=True and device={device!r}")
        kwargs["device"] = placed
    result = original(*args, **kwargs)
    if pinned:
        _mark_pinned(result)
    return result


def _random_factory(original: Any) -> Any:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs or "pin_memory" in kwargs or "generator" in kwargs:
            task = current_task()
            if task is not None:
                return _draw(original, task.rank.accelerator, args, kwargs)
        return original(*args, **kwargs)

    _tell_torchscript(original, factory)
    return factory


def _draw(original: Any, state: DeviceState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Draw from the device's generator if the device is named and the caller has given no generator."""
    device: Any = kwargs.get("device")
    generator = kwargs.get("generator")
    if isinstance(generator, DeviceGenerator):
        philox = generator.philox
    elif generator is None and state.place(device) is not device and not torch.compiler.is_compiling():
        philox = state.generator(device if type(device) is int else _device(device).index)
    else:
        return _create(original, state, args, kwargs)
    kwargs["generator"] = philox.source()
    result = _create(original, state, args, kwargs)
    philox.advance(result.numel())
    return result


def _tell_torchscript(original: Any, replacement: Any) -> None:
    """Let ``torch.jit.script`` take the replacement for the operator that it takes the original for."""
    from torch.jit import _builtins

    operator = _builtins._find_builtin(original)
    if operator is not None:
        _builtins._register_builtin(replacement, operator)


_MODULES_WITH_FACTORIES = (torch, torch.fft, torch.nested)
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
_RANDOM = ("normal", "rand", "randint", "randn", "randperm")
_NEW = ("new", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def _factories() -> list[Patch]:
    constructors = {id(function) for function in _device_constructors()}
    found = [
        Patch(module, name, once(_factory))
        for module in _MODULES_WITH_FACTORIES
        for name, value in list(vars(module).items())
        if id(value) in constructors and name not in _RANDOM
    ]
    found += [Patch(torch, name, once(_factory)) for name in _LIKE]
    found += [Patch(torch, name, once(_random_factory)) for name in _RANDOM]
    return found + [Patch(_Tensor, name, _inherited(name, _factory)) for name in _NEW]


# -- moving -----------------------------------------------------------------------------------------------------------


def _inherited(name: str, build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A ``make`` for a method that ``torch.Tensor`` inherits from its C base."""
    return once(lambda original: build(original or getattr(_Tensor, name)))


def _to(original: Any) -> Any:
    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            first = args[0]
            kind = type(first)
            # For speed: what is no CUDA device does not cost a look at the task.
            if ((kind is str or kind is _device) and first in CUDA_DEVICES) or kind is int:
                task = current_task()
                if task is not None:
                    args = (task.rank.accelerator.place(first), *args[1:])
        elif "device" in kwargs:
            task = current_task()
            if task is not None:
                kwargs["device"] = task.rank.accelerator.place(kwargs["device"])
        return original(self, *args, **kwargs)

    return to


def _cuda(original: Any) -> Any:
    to = torch._C.TensorBase.to

    @functools.wraps(original)
    def cuda(self: Any, device: Any = None, *args: Any, **kwargs: Any) -> Any:
        task = current_task()
        if task is None:
            return original(self, device, *args, **kwargs)
        task.rank.accelerator.index_of(device)
        return _moved(to, self, *args, **kwargs)

    return cuda


def _moved(
    to: Any, tensor: Any, non_blocking: bool = False, memory_format: torch.memory_format = torch.preserve_format
) -> Any:
    return to(tensor, CPU, non_blocking=non_blocking, memory_format=memory_format)


def _type(original: Any) -> Any:
    @functools.wraps(original)
    def type_(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None and current_task() is not None:
            dtype = _cpu_type(dtype)
        return original(self, dtype, *args, **kwargs)

    return type_


def _cpu_type(dtype: Any) -> Any:
    if isinstance(dtype, str):
        return dtype.replace("torch.cuda.", "torch.", 1) if dtype.startswith("torch.cuda.") else dtype
    return getattr(dtype, "on_cpu", dtype)


def _parse_to(original: Any) -> Any:
    """What ``Module.to`` reads its arguments with; it knows no bare index where there is no accelerator."""

    @functools.wraps(original)
    def parse_to(*args: Any, **kwargs: Any) -> Any:
        task = current_task()
        if task is not None:
            state = task.rank.accelerator
            if args and type(args[0]) in (int, str, _device):
                args = (state.place(args[0]), *args[1:])
            elif "device" in kwargs:
                kwargs["device"] = state.place(kwargs["device"])
        return original(*args, **kwargs)

    return parse_to


def _storage_to(original: Any) -> Any:
    @functools.wraps(original)
    def to(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        task = current_task()
        if task is not None:
            device = task.rank.accelerator.place(device)
        return original(self, device=device, non_blocking=non_blocking)

    return to


# -- pinned memory ----------------------------------------------------------------------------------------------------

_PINNED = "_lightrft_pinned"


def _storage(tensor: Any) -> Any:
    """The tensor's storage, or ``None`` for layouts that have none."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _mark_pinned(tensor: Any) -> None:
    storage = _storage(tensor)
    if storage is not None:
        setattr(storage, _PINNED, True)


def _is_pinned(state: DeviceState, tensor: Any, device: Any = None) -> bool:  # noqa: ARG001
    return getattr(_storage(tensor), _PINNED, False)


def _pin_memory(original: Any) -> Any:
    @functools.wraps(original)
    def pin_memory(self: Any, device: Any = None) -> Any:
        task = current_task()
        if task is None or self.device.type != "cpu":
            return original(self, device)
        if _is_pinned(task.rank.accelerator, self):
            return self
        result = self.clone()
        _mark_pinned(result)
        return result

    return pin_memory


# -- types, generators, default device --------------------------------------------------------------------------------


class _TensorType(RankClass):
    """Metaclass of what stands in for ``torch.cuda.FloatTensor`` and its like: called on a rank, they make CPU tensors.

    No tensor is an instance: none is on a CUDA device.
    """

    on_cpu: Any

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - of a metaclass
        return (cls.original if current_task() is None else cls.on_cpu)(*args, **kwargs)


def _tensor_type(name: str) -> Callable[[Any], Any]:
    def build(original: Any) -> Any:
        return _TensorType(name, (), {"original": original, "on_cpu": getattr(torch, name), "__module__": "torch.cuda"})

    return once(build)


class _GeneratorType(RankClass):
    """Metaclass of what stands in for ``torch.Generator``; the objects it makes are torch's own."""

    def __call__(cls, device: Any = "cpu") -> Any:  # noqa: N805 - of a metaclass
        task = current_task()
        return cls.original(device if task is None else task.rank.accelerator.place(device))


def _generator_type(original: Any) -> Any:
    return _GeneratorType("Generator", (), {"original": original, "__module__": "torch", "__doc__": original.__doc__})


def _device_context(original: Any) -> Any:
    """``DeviceContext.__init__``: behind ``with torch.device("cuda")`` and ``torch.set_default_device("cuda")``."""

    @functools.wraps(original)
    def __init__(self: Any, device: Any) -> None:  # noqa: N807
        task = current_task()
        original(self, device if task is None else task.rank.accelerator.place(device))

    return __init__


def _set_default_tensor_type(original: Any) -> Any:
    @functools.wraps(original)
    def set_default_tensor_type(t: Any, /) -> None:
        original(t if current_task() is None else _cpu_type(t))

    return set_default_tensor_type


_TYPES = ("BFloat16", "Bool", "Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")


def patches() -> list[Patch]:
    """Everything through which a tensor can be asked to be elsewhere."""
    from torch.utils._device import DeviceContext

    return [
        *_factories(),
        Patch(_Tensor, "to", _inherited("to", _to)),
        Patch(_Tensor, "cuda", _inherited("cuda", _cuda)),
        Patch(_Tensor, "type", _inherited("type", _type)),
        Patch(_Tensor, "pin_memory", _inherited("pin_memory", _pin_memory)),
        Patch(_Tensor, "is_pinned", _inherited("is_pinned", answer(_is_pinned))),
        Patch(torch._C._nn, "_parse_to", once(_parse_to)),
        Patch(torch.storage._StorageBase, "to", once(_storage_to)),
        *[Patch(torch.cuda, f"{name}Tensor", _tensor_type(f"{name}Tensor")) for name in _TYPES],
        Patch(torch, "Generator", once(_generator_type)),
        Patch(DeviceContext, "__init__", once(_device_context)),
        # Contexts that ranks enter and leave crosswise leave something behind; a run shall not.
        Patch(torch.utils._device, "CURRENT_DEVICE", lambda original: original, aliases=False),
        Patch(torch, "set_default_tensor_type", once(_set_default_tensor_type)),
    ]
