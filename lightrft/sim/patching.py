"""Replace attributes of modules and classes for the time of a run, and put every one of them back.

A module that did ``from time import sleep`` before the run holds the original under a name of its own. Such aliases in
the user's modules are replaced and restored as well, so that it does not matter how a name was imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from lightrft.sim import places

__all__ = ["Patch", "Patcher"]

_MISSING = object()
_aliases: dict[frozenset[int], WeakKeyDictionary[ModuleType, tuple[int, list[str]]]] = {}
"""By the originals looked for: for each module its number of names when it was looked through, and what was found."""


@dataclass(frozen=True, slots=True)
class Patch:
    """One attribute to replace.

    ``make`` receives the original (``None`` if the owner has no such attribute) and returns the replacement. A
    replacement that is a function asks :func:`lightrft.sim.current.current_task` first and calls the original when the
    answer is ``None``, so that threads outside the simulation never notice.
    """

    owner: Any
    name: str
    make: Callable[[Any], Any]
    aliases: bool = True


class _Aliases(NamedTuple):
    """What a look through all modules found.

    Attributes:
        originals: what was looked for.
        imported: all modules.
        namespaces: those of them that are real ones.
        sizes: the number of names in each of these.
        holders: the namespaces that hold an original, and its names there.
    """

    originals: frozenset[int]
    imported: dict[str, ModuleType]
    namespaces: list[dict[str, Any]]
    sizes: list[int]
    holders: list[tuple[dict[str, Any], list[str]]]

    def still_holds(self, originals: frozenset[int]) -> bool:
        """Whether another look would find the same: asked at every run, of thousands of modules."""
        return (
            originals == self.originals
            and sys.modules == self.imported
            and list(map(len, self.namespaces)) == self.sizes
        )


_latest = _Aliases(frozenset(), {}, [], [], [])


class Patcher:
    """Applies patches and remembers how to undo them, last one first."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []
        self._undo_globals: list[tuple[dict[str, Any], str, Any, Any]] = []
        self._replaced: dict[int, tuple[Any, Any]] = {}

    def apply(self, patches: Iterable[Patch]) -> None:
        """Replace every attribute named in ``patches``."""
        for patch in patches:
            original = vars(patch.owner).get(patch.name, _MISSING)
            value = patch.make(None if original is _MISSING else original)
            self._undo.append((patch.owner, patch.name, original))
            setattr(patch.owner, patch.name, value)
            if patch.aliases and original is not _MISSING and isinstance(patch.owner, ModuleType):
                self._replaced[id(original)] = (original, value)

    def replace_aliases(self) -> None:
        """Replace, in modules that hold one of the originals under a name of their own, that name too.

        What a module holds is looked up when it is first seen, and again when it has more or fewer names.
        """
        global _latest  # noqa: PLW0603 - most runs of a process find the same
        originals = frozenset(self._replaced)
        if not _latest.still_holds(originals):
            _latest = self._look(originals)
        for namespace, keys in _latest.holders:
            for key in keys:
                self._replace(namespace, key)

    def _look(self, originals: frozenset[int]) -> _Aliases:
        known = _aliases.setdefault(originals, WeakKeyDictionary())
        found = _Aliases(originals, sys.modules.copy(), [], [], [])
        for name, module in found.imported.items():
            if type(module) is not ModuleType and not issubclass(type(module), ModuleType):
                continue
            namespace = vars(module)
            size = len(namespace)
            entry = known.get(module)
            if entry is None or entry[0] != size:
                entry = known[module] = (size, self._find_aliases(name, module))
            found.namespaces.append(namespace)
            found.sizes.append(size)
            if entry[1]:
                found.holders.append((namespace, entry[1]))
        return found

    def _find_aliases(self, name: str, module: ModuleType) -> list[str]:
        namespace = getattr(module, "__dict__", None)
        if not isinstance(namespace, dict) or not places.may_hold_aliases(name, namespace.get("__file__")):
            return []
        replaced = self._replaced
        return [key for key, value in list(namespace.items()) if id(value) in replaced]

    def _replace(self, namespace: dict[str, Any], key: str) -> None:
        value = namespace.get(key)
        found = self._replaced.get(id(value))
        if found is not None and value is found[0]:
            namespace[key] = found[1]
            self._undo_globals.append((namespace, key, *found))

    def restore(self) -> None:
        """Undo everything; a name that something else has replaced since keeps its newer value."""
        while self._undo_globals:
            namespace, key, original, value = self._undo_globals.pop()
            if namespace.get(key) is value:
                namespace[key] = original
        while self._undo:
            owner, name, original = self._undo.pop()
            if original is _MISSING:
                if name in vars(owner):
                    delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._replaced.clear()
