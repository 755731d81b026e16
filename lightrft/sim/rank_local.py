"""Modules of which every rank has its own globals.

A module keeps its identity, its functions and its classes; what changes at a switch is contents: the names bound in the
module, the items of its dicts, lists and sets, the attributes of its classes and of its instances, mutable default
arguments and function attributes. Other modules may hold references to any of these and stay right.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch

from lightrft.errors import ConfigError
from lightrft.sim.current import current_task
from lightrft.sim.imports import ExecutionHook
from lightrft.sim.threads import RAW_LOCK, RAW_RLOCK, SimLock, SimRLock

__all__ = ["RankLocalModules"]


class _Cell:
    """A mutable object whose contents belong to the running rank."""

    def __init__(self, target: Any, read: Callable[[Any], Any], write: Callable[[Any, Any], None]) -> None:
        self.target = target
        self.read = read
        self.write = write


def _write_dict(target: Any, contents: dict[Any, Any]) -> None:
    target.clear()
    target.update(contents)


def _write_list(target: Any, contents: list[Any]) -> None:
    target[:] = contents


def _write_set(target: Any, contents: set[Any]) -> None:
    target.clear()
    target.update(contents)


def _write_deque(target: Any, contents: list[Any]) -> None:
    target.clear()
    target.extend(contents)


def _read_class(target: type) -> dict[str, Any]:
    return {name: value for name, value in vars(target).items() if not _belongs_to_class(name, value)}


def _write_class(target: type, contents: dict[str, Any]) -> None:
    current = _read_class(target)
    for name in current.keys() - contents.keys():
        delattr(target, name)
    for name, value in contents.items():
        if name not in current or current[name] is not value:
            setattr(target, name, value)


def _read_cache(target: Any) -> None:
    target.cache_clear()


def _write_cache(target: Any, contents: None) -> None:
    """A cache is emptied when its rank leaves; what it held is computed again."""


def _belongs_to_class(name: str, value: Any) -> bool:
    return (
        (name.startswith("__") and name.endswith("__"))
        or isinstance(value, (FunctionType, classmethod, staticmethod, property, type))
        or hasattr(type(value), "__set__")
    )


_CONTAINERS: list[tuple[type, Callable[[Any], Any], Callable[[Any, Any], None]]] = [
    (dict, dict, _write_dict),
    (list, list, _write_list),
    (set, set, _write_set),
    (deque, list, _write_deque),
]


class _Collector:
    """Finds the cells of one module."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.cells: list[_Cell] = []
        self._seen: set[int] = set()
        for value in list(vars(module).values()):
            self.visit(value)

    def visit(self, value: Any) -> None:
        if id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, functools._lru_cache_wrapper):
            if value.__module__ == self.module.__name__:
                self.cells.append(_Cell(value, _read_cache, _write_cache))
        elif isinstance(value, type):
            self._visit_class(value)
        elif not self._visit_container(value) and self._is_own_instance(value):
            self.cells.append(_Cell(vars(value), dict, _write_dict))

    def _visit_container(self, value: Any) -> bool:
        if value is vars(self.module).get("__builtins__"):
            return True
        for kind, read, write in _CONTAINERS:
            if isinstance(value, kind):
                self.cells.append(_Cell(value, read, write))
                return True
        return False

    def _visit_function(self, function: FunctionType) -> None:
        if function.__module__ != self.module.__name__:
            return
        for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit_container(default)
        self.cells.append(_Cell(function.__dict__, dict, _write_dict))

    def _visit_class(self, cls: type) -> None:
        if cls.__module__ != self.module.__name__:
            return
        self.cells.append(_Cell(cls, _read_class, _write_class))
        for value in list(vars(cls).values()):
            self.visit(getattr(value, "__func__", value))

    def _is_own_instance(self, value: Any) -> bool:
        return type(value).__module__ == self.module.__name__ and hasattr(value, "__dict__")


class _Local:
    """One rank-local module, its cells, and the contents every new rank starts with.

    Args:
        late: whether the module was imported during the run; then every rank that imports it executes it anew.
    """

    def __init__(self, module: ModuleType, *, late: bool = False) -> None:
        self.module = module
        self.late = late
        self.cells = _Collector(module).cells
        self.namespace = vars(module)
        self.pristine = self._copied(self.read())
        self.original = self.read()

    def read(self) -> list[Any]:
        return [dict(self.namespace), *(cell.read(cell.target) for cell in self.cells)]

    def write(self, contents: list[Any]) -> None:
        if self.namespace != contents[0]:
            _write_dict(self.namespace, contents[0])
        for cell, values in zip(self.cells, contents[1:], strict=True):
            cell.write(cell.target, values)

    def _copied(self, contents: list[Any]) -> list[Any]:
        """Deep copies, in which every cell and everything that is no plain data still is itself."""
        memo = {id(cell.target): cell.target for cell in self.cells}
        for value in self.namespace.values():
            if not isinstance(value, _COPIED):
                memo[id(value)] = value
        copied = [_copy(values, memo) for values in contents]
        copied[0].update({name: _fresh_lock(value) for name, value in contents[0].items() if type(value) in _LOCKS})
        return copied

    def fresh(self) -> list[Any]:
        return self._copied(self.pristine)

    def show(self) -> None:
        """Let the running rank find the module as imported."""
        name = self.module.__name__
        sys.modules[name] = self.module
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, self.module)

    def hide(self) -> None:
        """Let the running rank find that the module has yet to be imported."""
        name = self.module.__name__
        sys.modules.pop(name, None)
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            vars(sys.modules[parent]).pop(child, None)

    def take_over(self, executed: ModuleType) -> None:
        """Take the data that executing the module on this rank gave; functions and classes stay those of all ranks."""
        for name, value in vars(executed).items():
            mine = self.namespace.get(name)
            if isinstance(value, type) and isinstance(mine, type) and value.__module__ == self.module.__name__:
                for key, item in _read_class(value).items():
                    if _is_data(item):
                        setattr(mine, key, item)
            elif _is_data(value) and not (name.startswith("__") and name.endswith("__")):
                self._take_value(name, mine, value)

    def _take_value(self, name: str, mine: Any, value: Any) -> None:
        for kind, read, write in _CONTAINERS:
            if isinstance(value, kind) and type(mine) is type(value):
                write(mine, read(value))
                return
        self.namespace[name] = value


def _is_data(value: Any) -> bool:
    """Whether a value is data rather than code or an object with behaviour of its own."""
    kind = type(value)
    return kind in _DATA or kind.__module__.partition(".")[0] in ("torch", "numpy", "pathlib", "datetime", "os")


_DATA = frozenset({type(None), bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset, deque})


_COPIED = (tuple, *(kind for kind, _, _ in _CONTAINERS), torch.Tensor, torch.Generator, np.ndarray, random.Random)
"""What each rank gets a copy of; everything else that a module's names are bound to is shared."""

_LOCKS = (RAW_LOCK, RAW_RLOCK, SimLock, SimRLock)


def _fresh_lock(lock: Any) -> Any:
    return SimRLock() if type(lock) in (RAW_RLOCK, SimRLock) else SimLock()


def _copy(values: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(values, dict(memo))
    except Exception:  # noqa: BLE001 - something inside cannot be copied: copy item by item, share what cannot
        if isinstance(values, dict):
            return {key: _copy_item(value, memo) for key, value in values.items()}
        if isinstance(values, (list, set)):
            return type(values)(_copy_item(value, memo) for value in values)
        return values


def _copy_item(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, dict(memo))
    except Exception:  # noqa: BLE001 - a value may refuse to be copied with any error
        return value


class RankLocalModules(ExecutionHook):
    """The modules named ``names`` and everything below them, imported before or during the run."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.active = bool(self.names)
        self._locals: list[_Local] = []

    def begin(self) -> None:
        """Remember what the modules hold that are already imported."""
        if not self.active:
            return
        self._locals = [_Local(m) for n, m in list(sys.modules.items()) if self.matches(n)]
        sys.meta_path.insert(0, self)

    def end(self) -> None:
        """Give the modules the contents they had before the run."""
        if not self.active:
            return
        sys.meta_path.remove(self)
        for local in self._locals:
            local.write(local.original)
            local.show()

    def check_used(self) -> None:
        """Raise :class:`ConfigError` if one of the names fits no module that anybody imported."""
        for wanted in self.names:
            if not any(_below(local.module.__name__, wanted) for local in self._locals):
                raise ConfigError(f"rank_local names {wanted!r}, but nothing imported a module of that name")

    def matches(self, name: str) -> bool:
        """Whether a module of this name is rank-local."""
        return any(_below(name, wanted) for wanted in self.names)

    def pristine(self) -> list[Any]:
        """For each module, whether a rank that starts now has imported it, and its contents."""
        return [[not local.late, local.fresh()] for local in self._locals]

    def save(self, states: list[Any]) -> None:
        """Read the contents that the running rank leaves behind."""
        for local, state in zip(self._locals, states, strict=True):
            state[1] = local.read()

    def load(self, states: list[Any]) -> None:
        """Write the contents of the rank that runs next."""
        # some may have been imported by another rank meanwhile
        states.extend([False, local.fresh()] for local in self._locals[len(states) :])
        for local, (imported, contents) in zip(self._locals, states, strict=True):
            local.write(contents)
            if local.late:
                local.show() if imported else local.hide()

    def wants(self, name: str) -> bool:
        """The modules that are rank-local."""
        return self.matches(name)

    def execute(self, module: ModuleType, run: Callable[[], None]) -> None:
        """Execute a rank-local module for the running rank."""
        run()
        self.executed(module)

    def executed(self, module: ModuleType) -> None:
        """A rank has just executed a module: the first one to do so gives all ranks their functions and classes."""
        task = current_task()
        assert task is not None
        states = task.rank.state.modules
        for local, state in zip(self._locals, states, strict=False):
            if local.module.__name__ == module.__name__:
                local.take_over(module)
                state[0] = True
                local.show()
                return
        local = _Local(module, late=True)
        self._locals.append(local)
        states.append([True, local.read()])


def _below(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
