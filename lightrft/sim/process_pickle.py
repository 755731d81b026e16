"""What travels between processes: functions with their arguments, results, exceptions."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import cloudpickle
import torch

from lightrft.errors import SimulationError
from lightrft.sim.places import is_user_file

__all__ = ["dumps", "pickle_call"]


class Pickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle has no annotations
    """Knows what cloudpickle does not: modules of a class of their own, pytest's outcomes, tensors of a GPU."""

    def reducer_override(self, obj: Any) -> Any:
        name = getattr(obj, "__name__", "") if isinstance(obj, (ModuleType, type)) else ""
        if name and type(obj) is not ModuleType and sys.modules.get(name) is obj:
            return importlib.import_module, (name,)  # such as torch.ops
        outcomes = sys.modules.get("_pytest.outcomes")
        if name and getattr(obj, "__module__", "") == "builtins" and getattr(outcomes, name, None) is obj:
            return getattr, (outcomes, name)  # pytest's outcomes only say that they were builtins
        if isinstance(obj, torch.Tensor) and obj.device.type not in ("cpu", "meta"):
            return obj.cpu().__reduce_ex__(pickle.HIGHEST_PROTOCOL)  # where it arrives, there may be no such GPU
        return super().reducer_override(obj)


def dumps(value: Any) -> bytes:
    """``value``, pickled: functions and classes of ``__main__`` too, and tensors on the CPU."""
    file = io.BytesIO()
    Pickler(file).dump(value)
    return file.getvalue()


def pickle_call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """The warning filters of this process, and ``fn(*args, **kwargs)`` as a function without arguments.

    Functions and classes of test modules, and of modules that another process would not find, travel with the globals
    that they use. Everything else is imported where it arrives.

    Raises:
        SimulationError: something cannot be pickled; the message says what.
    """
    with _travelling_modules():
        try:
            return dumps((warnings.filters, functools.partial(fn, *args, **kwargs)))
        except Exception as error:
            raise SimulationError(_problem(fn, args, kwargs, error)) from error


def _problem(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> str:
    """Which part it is that cannot be pickled."""
    parts = {f"argument {position}": value for position, value in enumerate(args)}
    parts |= {f"argument {name!r}": value for name, value in kwargs.items()}
    for name, value in {"the function": fn, **parts}.items():
        try:
            dumps(value)
        except Exception as found:  # noqa: BLE001 - pickling runs code of the user
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            return (
                f"{name} ({kind}) cannot be sent to the ranks of a process world: {found}. Real processes share no "
                "memory: make it inside the function, or give plain data."
            )
    return f"the function cannot be sent to the ranks of a process world: {error}"


@contextlib.contextmanager
def _travelling_modules() -> Iterator[None]:
    """Have cloudpickle send by value what another process could not import as it is here."""
    already = cloudpickle.list_registry_pickle_by_value() | {"__main__"}  # whose objects travel anyway
    found = [module for name, module in list(sys.modules.items()) if name not in already and _must_travel(name, module)]
    for module in found:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in found:
            cloudpickle.unregister_pickle_by_value(module)


def _must_travel(name: str, module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    if not isinstance(file, str) or not is_user_file(file) or module.__name__ != name:
        return False
    if name.partition(".")[0] == "lightrft":  # every rank has it; pytest loads it as its own, once it is installed
        return False
    loader = type(getattr(module, "__loader__", None)).__module__
    return loader.startswith("_pytest.") or not _is_importable(name, file, tuple(sys.path))


@functools.lru_cache(maxsize=4096)
def _is_importable(name: str, file: str, _path: tuple[str, ...]) -> bool:
    """Whether ``import name`` in a process with this search path finds ``file``."""
    search: Any = None
    spec = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        spec = _find_spec(".".join(parts[:count]), search)
        if spec is None:
            return False
        search = spec.submodule_search_locations
    return spec is not None and spec.origin is not None and os.path.realpath(spec.origin) == os.path.realpath(file)


def _find_spec(name: str, search: Any) -> Any:
    for finder in sys.meta_path:
        spec = finder.find_spec(name, search)
        if spec is not None:
            return spec
    return None
