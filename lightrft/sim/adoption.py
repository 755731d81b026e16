"""Locks that were made before the run: replaced by simulated ones, and put back afterwards.

A plain lock blocks the whole process, so a deadlock over one could only be seen by its silence. Found here is what the
function of the run reaches through its arguments, its closure, the globals of its module and the attributes of its
objects; and in all modules of the user's the locks in globals, in attributes of classes and in those of instances.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CellType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

from lightrft.sim.places import is_user_class, is_user_file
from lightrft.sim.threads import RAW_LOCK, RAW_RLOCK, SimLock, SimRLock

if TYPE_CHECKING:
    from lightrft.sim.surveys import Modules, Parts

__all__ = ["LockAdoption"]

_MOST_OBJECTS = 2000
_LOCKS = (RAW_LOCK, RAW_RLOCK)


class LockAdoption:
    """Finds plain locks, replaces them, and undoes it."""

    def __init__(self) -> None:
        self._undo: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []
        self._made: dict[int, Any] = {}
        self._keep: list[Any] = []
        self._seen: set[int] = set()

    def adopt(self, value: Any) -> Any:
        """What to use instead of ``value``: a simulated lock for a plain one, else ``value``, looked through."""
        kind = type(value)
        if kind in _LOCKS:
            if id(value) not in self._made:
                self._keep.append(value)
                self._made[id(value)] = SimLock(value) if kind is RAW_LOCK else SimRLock()
            return self._made[id(value)]
        if id(value) not in self._seen and len(self._seen) < _MOST_OBJECTS:
            self._seen.add(id(value))
            self._keep.append(value)
            self._look_through(value)
        return value

    def adopt_modules(self, modules: Modules, parts: list[Parts]) -> None:
        """Replace the locks of the user's modules, which consist of ``parts``."""
        of_user: dict[type, bool] = {}
        for (_, module), of_it in zip(modules, parts, strict=True):
            namespace = vars(module)
            for name in of_it.objects:
                value = namespace.get(name)
                kind = type(value)
                if kind in _LOCKS:
                    self._replace(namespace, name, value)
                    continue
                known = of_user.get(kind)
                if known is None:
                    known = of_user[kind] = not issubclass(kind, type) and is_user_class(kind)
                if known:
                    self._attributes(value)
            for cls in of_it.classes:
                self._class(cls)

    def restore(self) -> None:
        """Put the plain locks back."""
        while self._undo:
            function, arguments = self._undo.pop()
            function(*arguments)

    def _look_through(self, value: Any) -> None:
        if isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self.adopt(value.__func__)
            self.adopt(value.__self__)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self.adopt(part)
        elif type(value) is list:
            self._items(value, range(len(value)))
        elif type(value) is dict:
            self._items(value, list(value))
        elif type(value) is tuple:
            for item in value:
                self.adopt(item)
        elif is_user_class(type(value)) and isinstance(getattr(value, "__dict__", None), dict):
            self._items(vars(value), list(vars(value)))

    def _class(self, cls: type) -> None:
        for name, value in list(vars(cls).items()):
            if type(value) in _LOCKS:
                type.__setattr__(cls, name, self.adopt(value))
                self._undo.append((type.__setattr__, (cls, name, value)))

    def _attributes(self, instance: Any) -> None:
        attributes = getattr(instance, "__dict__", None)
        if type(attributes) is dict:
            for name, value in list(attributes.items()):
                if type(value) in _LOCKS:
                    self._replace(attributes, name, value)

    def _replace(self, namespace: dict[str, Any], name: str, old: Any) -> None:
        namespace[name] = self.adopt(old)
        self._undo.append((namespace.__setitem__, (name, old)))

    def _items(self, container: Any, keys: Any) -> None:
        for key in keys:
            old = container[key]
            new = self.adopt(old)
            if new is not old:
                container[key] = new
                self._undo.append((container.__setitem__, (key, old)))

    def _function(self, function: FunctionType) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self.adopt(wrapped)
        for cell in function.__closure__ or ():
            self._cell(cell)
        if is_user_file(function.__code__.co_filename) and id(function.__globals__) not in self._seen:
            self._seen.add(id(function.__globals__))
            self._globals(function.__globals__)

    def _globals(self, namespace: dict[str, Any]) -> None:
        """Only locks and containers of them: other functions of the module share these globals anyway."""
        for name, old in list(namespace.items()):
            if not name.startswith("__") and (type(old) in (*_LOCKS, list, dict) or is_user_class(type(old))):
                new = self.adopt(old)
                if new is not old:
                    namespace[name] = new
                    self._undo.append((namespace.__setitem__, (name, old)))

    def _cell(self, cell: CellType) -> None:
        try:
            old = cell.cell_contents
        except ValueError:  # empty
            return
        new = self.adopt(old)
        if new is not old:
            cell.cell_contents = new
            self._undo.append((setattr, (cell, "cell_contents", old)))
