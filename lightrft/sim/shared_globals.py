"""Finds state of the user's modules to which two ranks write.

In real processes each rank has its own; here all ranks share it unless the module is rank-local. Bytecode shows what
some function may write to: globals, class attributes, attributes of functions and of instances, mutable default
arguments, caches. Only that is watched, at every switch, and only until two ranks have written to it.
"""

from __future__ import annotations

import importlib._bootstrap
import sys
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from lightrft.sim.bytecode import INSIDE, WRITES, uses_of
from lightrft.sim.contents import Contents, has_containers, is_container, is_instance
from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch
from lightrft.sim.surveys import (
    Modules,
    Parts,
    Survey,
    full_name,
    merged,
    parts_of,
    rank_read_by,
    survey_of,
    user_modules,
)
from lightrft.sim.watched import Watched, WatchedCache

if TYPE_CHECKING:
    from lightrft.sim.scheduler import Task

__all__ = ["SharedGlobals", "patches"]


class SharedGlobals:
    """What is watched in one run.

    Args:
        is_local: says whether a module of this name is rank-local, and so of no interest.
    """

    def __init__(self, is_local: Callable[[str], bool]) -> None:
        self._is_local = is_local
        self._known: dict[str, Watched | WatchedCache] = {}
        self._watched: list[Watched | WatchedCache] = []
        self._found: list[Watched | WatchedCache] = []
        self._modules = 0
        self._main: Any = None
        self._importing: dict[Task, int] = {}
        self._prepare()

    def begin(self, modules: Modules, parts: list[Parts]) -> None:
        """Look through the user's modules, which consist of ``parts``."""
        self._main = sys.modules.get("__main__")
        self._scan(modules, parts)

    def look(self, rank: int) -> None:
        """``rank`` is about to leave the baton: note what it has written."""
        if self._watched and self._glance() != self._last:
            self._note_writes(rank)
        if len(sys.modules) != self._modules:
            self._scan_again()

    def warnings(self) -> Iterator[str]:
        """One message for each thing that several ranks wrote to."""
        for watched in sorted(self._found, key=lambda each: each.label):
            if watched.matters():
                yield watched.warning()

    def import_begins(self, task: Task) -> None:
        """``task`` imports a module that was not imported before."""
        depth = self._importing.get(task, 0)
        self._importing[task] = depth + 1
        if not depth:
            self.look(task.rank.index)

    def import_ends(self, task: Task) -> None:
        """What was written meanwhile (a registry was filled, say) is written once in any process."""
        self._importing[task] -= 1
        if not self._importing[task] and len(sys.modules) != self._modules:
            self._note_writes(None)
            self._scan_again()

    def is_importing(self, task: Task) -> bool:
        """Whether ``task`` is executing a module that no rank has imported before."""
        return bool(self._importing.get(task))

    # -- a look -------------------------------------------------------------------------------------------------

    def _glance(self) -> Any:
        try:
            bound = [tuple(map(id, get(namespace))) for get, namespace in self._bound]
            absent = [name in namespace for name, namespace in self._absent] if self._absent else None
            caches = [info() for info in self._caches] if self._caches else None
            return bound, absent, caches, self._contents.glance()
        except (KeyError, RuntimeError):  # a name is gone; a finalizer has written to what is just looked at
            return None

    def _note_writes(self, rank: int | None) -> None:
        for watched in self._watched:
            if watched.changed():
                if rank is not None and rank not in watched.writers:
                    watched.writers.append(rank)
                watched.reset()
        self._found += [each for each in self._watched if len(each.writers) > 1]
        self._watched = [each for each in self._watched if len(each.writers) < 2]
        self._prepare()

    def _prepare(self) -> None:
        """Arrange what is watched so that one glance at all of it is cheap."""
        names: dict[int, tuple[Mapping[str, Any], list[str]]] = {}
        self._absent: list[tuple[str, Mapping[str, Any]]] = []
        self._contents = Contents()
        for watched in self._watched:
            self._contents.join(watched.contents)
            if watched.key in watched.namespace:
                names.setdefault(id(watched.namespace), (watched.namespace, []))[1].append(watched.key)
            elif watched.key:
                self._absent.append((watched.key, watched.namespace))
        self._caches = [watched.info for watched in self._watched if isinstance(watched, WatchedCache)]
        self._bound = [(itemgetter(keys[0], *keys), namespace) for namespace, keys in names.values()]
        self._last = self._glance()

    # -- what to watch ------------------------------------------------------------------------------------------

    def _scan_again(self) -> None:
        modules = user_modules()
        self._scan(modules, parts_of(modules))

    def _scan(self, modules: Modules, parts: list[Parts]) -> None:
        self._modules = len(sys.modules)
        pairs = zip(modules, parts, strict=True)
        ours = [(name, module, of_it) for (name, module), of_it in pairs if self._is_of_interest(name, module)]
        everything = _merged(tuple(survey_of(module) for _, module, _ in ours))
        for name, module, of_it in ours:
            for watched in _candidates(name, module, of_it, everything).find(self._known):
                self._known[watched.label] = watched
                self._watched.append(watched)
        self._prepare()

    def _is_of_interest(self, name: str, module: Any) -> bool:
        """Scripts are out of it: every rank that runs one has its own ``__main__``."""
        if name == "__mp_main__" or (name == "__main__" and module is not self._main):
            return False
        return not self._is_local(name)


_latest: list[tuple[tuple[Survey, ...], Survey]] = []


def _merged(surveys: tuple[Survey, ...]) -> Survey:
    """All surveys as one; most runs of a process see the same modules."""
    if not _latest or len(_latest[0][0]) != len(surveys) or any(map(_differ, _latest[0][0], surveys)):
        _latest[:] = [(surveys, merged(surveys))]
    return _latest[0][1]


def _differ(one: Survey, other: Survey) -> bool:
    return one is not other


_Place = tuple[str, str, Mapping[str, Any], str]
"""What it is, its qualified name, and the namespace and the key that it is bound to."""


class _Candidates:
    """What of one module may be written to, by its own functions or by those of others.

    What depends on nothing but what names are bound to is found once; contents are looked at by every :meth:`find`.
    """

    def __init__(self, name: str, module: ModuleType, parts: Parts, everything: Survey) -> None:
        self._name = name
        self._namespace = vars(module)
        self._own = survey_of(module)
        self._all = everything
        self._parts = parts
        globals_, classes = list(self._globals()), list(self._of_classes())
        self._surely = [place for place, sure in (*globals_, *classes) if sure]
        self._surely += self._attributes_of_functions()
        self._perhaps = [place for place, sure in (*globals_, *classes) if not sure]
        self._with_defaults = [
            (name, function)
            for name, function in self._parts.functions
            if any(map(is_container, (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())))
        ]

    def are_of(self, name: str, module: ModuleType, parts: Parts, everything: Survey) -> bool:
        """Whether others, made now, would be the same."""
        same = self._all is everything and self._own is survey_of(module) and self._parts is parts
        return same and self._name == name

    def find(self, known: Mapping[str, Any]) -> Iterator[Watched | WatchedCache]:
        """Those that are not ``known`` yet by their labels."""
        for what, name, namespace, key in (*self._surely, *self._with_contents(), *self._of_functions()):
            if f"{self._name}.{name}" not in known:
                yield Watched(self._name, name, what, namespace, key)
        for name, member in self._parts.caches:
            if f"{self._name}.{name}" not in known:
                reads = rank_read_by(member.__wrapped__)
                if reads:
                    yield WatchedCache(self._name, name, member, reads)

    def _globals(self) -> Iterator[tuple[_Place, bool]]:
        """Globals, and whether they may be bound anew; of those that may not, the contents may be written to."""
        namespace, rebound = self._namespace, self._own.rebound
        bound_anew = namespace.keys() & (rebound | (namespace.keys() & self._all.assigned))
        for key in dict.fromkeys([*self._parts.objects, *sorted(bound_anew)]):
            value = namespace.get(key)
            sure = key in rebound or (key in self._all.assigned and not _is_definition(value))
            if not key.startswith("__") and (sure or self._may_change(key, value, self._own.names.get(key, 0))):
                yield ("global", key, namespace, key), sure
        for key in sorted(rebound - namespace.keys()):
            yield ("global", key, namespace, key), True

    def _of_classes(self) -> Iterator[tuple[_Place, bool]]:
        """The same of the attributes of classes."""
        for cls in self._parts.classes:
            by_methods = (self._all.on_classes.get(full_name(base), ()) for base in cls.__mro__)
            written = dict.fromkeys(sorted({*self._all.assigned_of.get(cls.__name__, ())}.union(*by_methods)), True)
            for key, value in vars(cls).copy().items():
                is_data = not key.startswith("__") and not hasattr(type(value), "__get__")
                if is_data and (key in self._all.assigned or self._may_change(key, value, 0)):
                    written[key] = written.get(key, key in self._all.assigned)
            namespace = vars(cls)
            for key, sure in written.items():
                if not _is_definition(namespace.get(key)):
                    yield ("class attribute", f"{cls.__qualname__}.{key}", namespace, key), sure

    def _attributes_of_functions(self) -> Iterator[_Place]:
        for name, function in self._parts.functions:
            for key in sorted(self._all.assigned_of.get(function.__name__, set()) - {"__wrapped__"}):
                yield "function attribute", f"{name}.{key}", vars(function), key

    def _with_contents(self) -> Iterator[_Place]:
        for place in self._perhaps:
            what, _, namespace, key = place
            level = self._own.names.get(key, 0) if what == "global" else 0
            if self._changes(key, namespace.get(key), level):
                yield place

    def _of_functions(self) -> Iterator[_Place]:
        names, attributes, assigned = self._own.names, self._all.attributes, self._all.assigned
        for name, function in [pair for pair in self._parts.functions if pair[1].__dict__]:
            for key, value in list(vars(function).items()):
                if (key in attributes or key in names) and key not in assigned and self._changes(key, value, 0):
                    yield "function attribute", f"{name}.{key}", vars(function), key
        for name, function in self._with_defaults:
            yield from self._defaults(name, function)

    def _defaults(self, name: str, function: FunctionType) -> Iterator[tuple[str, str, Mapping[str, Any], str]]:
        code, values = function.__code__, function.__defaults__ or ()
        defaults = dict(zip(code.co_varnames[code.co_argcount - len(values) : code.co_argcount], values, strict=True))
        defaults.update(function.__kwdefaults__ or {})
        for key, value in defaults.items():
            if is_container(value) and _is_written(value, uses_of(code).parameters.get(key, 0)):
                yield "default argument", f"{name}({key}=...)", defaults, key

    def _may_change(self, key: str, value: Any, level: int) -> bool:
        """Whether :meth:`_changes` may ever say so, whatever the contents are."""
        named = key in self._own.names or key in self._all.attributes
        if is_container(value):
            return max(level, self._all.attributes.get(key, 0)) > 0
        return named and is_instance(value)

    def _changes(self, key: str, value: Any, level: int) -> bool:
        """Whether somebody may change the contents of ``value``, which is bound to ``key``."""
        if is_container(value):
            return _is_written(value, max(level, self._all.attributes.get(key, 0)))
        named = key in self._own.names or key in self._all.attributes
        return named and is_instance(value) and self._is_changed_instance(key, value)

    def _is_changed_instance(self, key: str, value: Any) -> bool:
        if key in self._all.assigned_of or isinstance(value, (torch.nn.Module, dict)):
            return True
        if any(self._all.on_instances.get(full_name(cls)) for cls in type(value).__mro__):
            return True
        attributes = self._all.attributes
        return any(
            name in self._all.assigned or (is_container(part) and _is_written(part, attributes.get(name, 0)))
            for name, part in getattr(value, "__dict__", {}).copy().items()
        )


_known_candidates: WeakKeyDictionary[ModuleType, _Candidates] = WeakKeyDictionary()


def _candidates(name: str, module: ModuleType, parts: Parts, everything: Survey) -> _Candidates:
    known = _known_candidates.get(module)
    if known is None or not known.are_of(name, module, parts, everything):
        known = _known_candidates[module] = _Candidates(name, module, parts, everything)
    return known


def _is_written(value: Any, level: int) -> bool:
    return level == WRITES or (level == INSIDE and has_containers(value))


def _is_definition(value: Any) -> bool:
    return isinstance(value, (FunctionType, type, ModuleType))


def _enter_import(original: Any) -> Any:
    def enter(self: Any) -> None:
        original(self)
        task = current_task()
        if task is not None:
            task.rank.world.shared.import_begins(task)

    return enter


def _exit_import(original: Any) -> Any:
    def leave(self: Any, *exc: Any) -> None:
        original(self, *exc)
        task = current_task()
        if task is not None:
            task.rank.world.shared.import_ends(task)

    return leave


_LOCK: Any = importlib._bootstrap._ModuleLockManager  # type: ignore[attr-defined] # around the import of every module
_PATCHES = [Patch(_LOCK, "__enter__", _enter_import), Patch(_LOCK, "__exit__", _exit_import)]


def patches() -> list[Patch]:
    """What tells when a rank imports a module."""
    return _PATCHES
