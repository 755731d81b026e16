"""Finds module globals of the user's code that two ranks write to.

In real processes each rank has its own; here all ranks share them unless the module is rank-local. Two kinds are
watched at every switch: names that some function rebinds (found in its bytecode), and dicts, lists and sets that some
function refers to by a global name.
"""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from lightrft.sim.places import is_user_file

__all__ = ["SharedGlobals"]

_MISSING = object()
_MOST_ITEMS = 64
_DEFINITIONS = (FunctionType, type, ModuleType)


class _Watched:
    __slots__ = ("last", "module", "name", "namespace", "writers")

    def __init__(self, module: str, name: str, namespace: dict[str, Any]) -> None:
        self.module = module
        self.name = name
        self.namespace = namespace
        self.last = self.fingerprint()
        self.writers: set[int] = set()

    def fingerprint(self) -> Any:
        value = self.namespace.get(self.name, _MISSING)
        kind = type(value)
        if kind is dict:
            items = tuple(map(id, value.values())) if len(value) <= _MOST_ITEMS else ()
        elif kind is list or kind is set:
            items = tuple(map(id, value)) if len(value) <= _MOST_ITEMS else ()
        else:
            return id(value)
        return id(value), len(value), items


class SharedGlobals:
    """The globals watched in one run.

    Args:
        is_local: says whether a module of this name is rank-local, and so of no interest.
    """

    def __init__(self, is_local: Callable[[str], bool]) -> None:
        self._is_local = is_local
        self._watched: list[_Watched] = []
        self._modules = 0
        self._known: set[str] = set()
        self._attributes_set: set[str] = set()
        self._attributes_read: set[str] = set()
        self.watching = False

    def begin(self) -> None:
        """Look through the modules that are loaded now."""
        self._scan()

    def _scan(self) -> None:
        self._modules = len(sys.modules)
        found: list[tuple[str, ModuleType]] = []
        for name, module in list(sys.modules.items()):
            if _is_of_user(module) and name not in self._known:
                self._known.add(name)
                if name not in ("__main__", "__mp_main__") and not self._is_local(name):
                    found.append((name, module))
        codes = {name: [_names_in(code) for code in _codes(module)] for name, module in found}
        for names in codes.values():
            for each in names:
                self._attributes_set |= each.attributes_set
                self._attributes_read |= each.attributes_read
        for name, module in found:
            keys = self._candidates(vars(module), codes[name])
            self._watched += [_Watched(name, key, vars(module)) for key in sorted(keys)]
        self.watching = True

    def _candidates(self, namespace: dict[str, Any], codes: list[_Names]) -> set[str]:
        """Names that somebody rebinds, and names of containers that somebody refers to."""
        rebound: set[str] = set().union(*(names.rebound for names in codes))
        read = set(self._attributes_read).union(*(names.read for names in codes))
        plain = {key for key in self._attributes_set if not isinstance(namespace.get(key), _DEFINITIONS)}
        mutable = {key for key in read if type(namespace.get(key)) in (dict, list, set)}
        return (rebound | plain | mutable) & namespace.keys()

    def look(self, rank: int) -> None:
        """``rank`` is about to leave the baton: note what it has written."""
        for watched in self._watched:
            now = watched.fingerprint()
            if now != watched.last:
                watched.last = now
                watched.writers.add(rank)
        if len(sys.modules) != self._modules:
            self._scan()

    def warnings(self) -> Iterator[str]:
        """One message for each global that several ranks wrote to."""
        for watched in self._watched:
            if len(watched.writers) > 1:
                some = ", ".join(map(str, sorted(watched.writers)[:4]))
                yield (
                    f"{watched.module}.{watched.name} is one global for all simulated ranks, and ranks {some} wrote to "
                    f"it; on a cluster each rank has its own. If that matters, run with "
                    f"SimWorld(rank_local=[{watched.module!r}]) or --rank-local {watched.module}"
                )


_of_user: WeakKeyDictionary[ModuleType, bool] = WeakKeyDictionary()


def _is_of_user(module: Any) -> bool:
    """Whether a module is the user's own; found out once for each."""
    if not isinstance(module, ModuleType):
        return False
    known = _of_user.get(module)
    if known is None:
        known = _of_user[module] = is_user_file(vars(module).get("__file__"))
    return known


def _codes(module: ModuleType) -> Iterator[CodeType]:
    for value in list(vars(module).values()):
        if isinstance(value, FunctionType) and value.__module__ == module.__name__:
            yield from _nested(value.__code__)
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for member in list(vars(value).values()):
                function = getattr(member, "__func__", member)
                if isinstance(function, FunctionType):
                    yield from _nested(function.__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


class _Names(NamedTuple):
    """Names that one code object uses."""

    rebound: frozenset[str]
    read: frozenset[str]
    attributes_set: frozenset[str]
    attributes_read: frozenset[str]


_OPCODES = {
    "STORE_GLOBAL": 0,
    "LOAD_GLOBAL": 1,
    "STORE_ATTR": 2,
    "LOAD_ATTR": 3,
    "LOAD_METHOD": 3,
}


@functools.lru_cache(maxsize=8192)
def _names_in(code: CodeType) -> _Names:
    names: list[set[str]] = [set(), set(), set(), set()]
    for instruction in dis.get_instructions(code):
        kind = _OPCODES.get(instruction.opname)
        if kind is not None:
            names[kind].add(instruction.argval)
    return _Names(*map(frozenset, names))
