"""Modules of which every rank has its own globals.

A module keeps its identity, its functions and its classes; what changes at a switch is contents: the names bound in the
module, the items of its dicts, lists and sets, the attributes of its classes and of its instances, mutable default
arguments and function attributes. Other modules may hold references to any of these and stay right.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections import deque
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any

from lightrft.errors import ConfigError

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
    """One rank-local module, its cells, and the contents every new rank starts with."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
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
            if not isinstance(value, (tuple, *(kind for kind, _, _ in _CONTAINERS))):
                memo[id(value)] = value
        return [_copy(values, memo) for values in contents]

    def fresh(self) -> list[Any]:
        return self._copied(self.pristine)


def _copy(values: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(values, dict(memo))
    except Exception:  # something inside cannot be copied: copy item by item, share what cannot
        if isinstance(values, dict):
            return {key: _copy_item(value, memo) for key, value in values.items()}
        if isinstance(values, (list, set)):
            return type(values)(_copy_item(value, memo) for value in values)
        return values


def _copy_item(value: Any, memo: dict[int, Any]) -> Any:
    try:
        return copy.deepcopy(value, dict(memo))
    except Exception:
        return value


class RankLocalModules(importlib.abc.MetaPathFinder):
    """The modules named ``names`` and everything below them, imported before or during the run."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.active = bool(self.names)
        self._locals: list[_Local] = []
        self._finding: set[str] = set()

    def begin(self) -> None:
        """Import the named modules where that has not happened, and remember what they hold."""
        if not self.active:
            return
        for name in self.names:
            try:
                importlib.import_module(name)
            except ImportError as error:
                raise ConfigError(f"rank_local names {name!r}, which cannot be imported: {error}") from error
        self._locals = [_Local(m) for n, m in list(sys.modules.items()) if m is not None and self.matches(n)]
        sys.meta_path.insert(0, self)

    def end(self) -> None:
        """Give the modules the contents they had before the run."""
        if not self.active:
            return
        sys.meta_path.remove(self)
        for local in self._locals:
            local.write(local.original)
        self._locals = []

    def matches(self, name: str) -> bool:
        """Whether a module of this name is rank-local."""
        return any(name == wanted or name.startswith(f"{wanted}.") for wanted in self.names)

    def pristine(self) -> list[Any]:
        """Contents for a rank that starts now."""
        return [local.fresh() for local in self._locals]

    def save(self, states: list[Any]) -> None:
        """Read the contents that the running rank leaves behind."""
        states[:] = [local.read() for local in self._locals]

    def load(self, states: list[Any]) -> None:
        """Write the contents of the rank that runs next."""
        for local in self._locals[len(states) :]:  # imported by another rank meanwhile
            states.append(local.fresh())
        for local, contents in zip(self._locals, states, strict=True):
            local.write(contents)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """See a rank-local module being imported during the run."""
        if not self.matches(fullname) or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def adopt(self, module: ModuleType) -> None:
        """Make a module rank-local that has just been executed."""
        self._locals.append(_Local(module))


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, owner: RankLocalModules) -> None:
        self._inner = inner
        self._owner = owner

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._inner.exec_module(module)
        self._owner.adopt(module)
