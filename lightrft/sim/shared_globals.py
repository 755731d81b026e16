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
from typing import Any

from lightrft.sim.places import is_user_file

__all__ = ["SharedGlobals"]

_MISSING = object()
_MOST_ITEMS = 64


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
        self.watching = False

    def begin(self) -> None:
        """Look through the modules that are loaded now."""
        self._scan()

    def _scan(self) -> None:
        self._modules = len(sys.modules)
        for name, module in list(sys.modules.items()):
            if name in self._known or module is None:
                continue
            self._known.add(name)
            file = getattr(module, "__file__", None)
            if name == "__main__" or not is_user_file(file) or self._is_local(name):
                continue
            self._watched += [_Watched(name, key, vars(module)) for key in sorted(_candidates(module))]
        self.watching = True

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


def _candidates(module: ModuleType) -> set[str]:
    written: set[str] = set()
    read: set[str] = set()
    for code in _codes(module):
        stores, loads = _global_names(code)
        written |= stores
        read |= loads
    namespace = vars(module)
    mutable = {name for name in read if type(namespace.get(name)) in (dict, list, set)}
    return (written & namespace.keys()) | mutable


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


@functools.lru_cache(maxsize=8192)
def _global_names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    stores, loads = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "STORE_GLOBAL":
            stores.add(instruction.argval)
        elif instruction.opname == "LOAD_GLOBAL":
            loads.add(instruction.argval)
    return frozenset(stores), frozenset(loads)
