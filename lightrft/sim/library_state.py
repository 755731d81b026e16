"""Gives every rank its own copy of what libraries keep in globals, as listed in :mod:`lightrft.sim.libraries`.

A library is shared code: it is imported once, and what its import leaves behind is what every rank starts with, whether
it was imported before the run or by a rank. From then on each rank has its own value of every listed place. Nobody
writes to most places in most programs: those are looked at when a rank leaves, all names of a module at once, and only
a place that has been written to is read and written at every switch.
"""

from __future__ import annotations

import sys
import warnings
from collections import deque
from collections.abc import Sequence
from operator import call, itemgetter
from types import FunctionType, ModuleType
from typing import Any

from lightrft.errors import SimWarning
from lightrft.sim.libraries import LIBRARIES, Library

__all__ = ["LibraryState"]

_MISSING = object()


# -- one place of state -----------------------------------------------------------------------------------------------


class _Name:
    """What a name of a module or class is bound to."""

    def __init__(self, holder: Any, name: str) -> None:
        self.holder = holder
        self.name = name
        self._get = vars(holder).get

    def read(self) -> Any:
        return self._get(self.name, _MISSING)

    def write(self, value: Any) -> None:
        if self._get(self.name, _MISSING) is value:
            return
        if value is _MISSING:
            delattr(self.holder, self.name)
        else:
            setattr(self.holder, self.name, value)

    def fresh(self, value: Any) -> Any:
        return value

    def merge(self, state: Any, before: Any, after: Any) -> Any:
        """``state`` of another rank, with what an import changed from ``before`` to ``after``."""
        return after if state is before else state


class _Contents:
    """What is in a dict, list, set or deque, which others may hold by reference."""

    def __init__(self, container: Any) -> None:
        self.container = container
        self._kind: Any = dict if isinstance(container, dict) else list

    def read(self) -> Any:
        return self._kind(self.container)

    def write(self, contents: Any) -> None:
        self.container.clear()
        if isinstance(self.container, (dict, set)):
            self.container.update(contents)
        else:
            self.container.extend(contents)

    def fresh(self, contents: Any) -> Any:
        return _copied(contents)

    def merge(self, state: Any, before: Any, after: Any) -> Any:
        if isinstance(after, dict):
            return state | {key: new for key, new in after.items() if before.get(key, _MISSING) is not new}
        return state + [item for item in after if item not in before]


def _copied(value: Any) -> Any:
    """A copy in which containers are new and everything else is shared."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) in (list, set, tuple, deque):
        return type(value)(map(_copied, value))
    return value


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, set, deque))


def _is_plain(name: str, value: Any) -> bool:
    return not name.startswith("__") and type(value) in (type(None), bool, int, float, str, dict, list, set)


def _places(module: ModuleType, path: str) -> list[Any]:
    """The places that a path names; a path that this version of the library lacks names none."""
    if path == "*":
        names = [name for name, value in vars(module).items() if _is_plain(name, value)]
        return [place for name in names for place in _places(module, name)]
    *steps, last = path.removesuffix("()").removesuffix(".*").split(".")
    holder: Any = module
    for step in steps:
        holder = getattr(holder, step, None)
    value = getattr(holder, last, None)
    if path.endswith("()"):
        function = getattr(value, "__func__", value)
        defaults = function.__defaults__ or () if isinstance(function, FunctionType) else ()
        return [_Contents(default) for default in defaults if _is_container(default)]
    if path.endswith(".*"):
        return [_Contents(vars(value))] if hasattr(value, "__dict__") else []
    bound = [_Name(holder, last)] if isinstance(holder, (ModuleType, type)) else []
    return [*bound, *([_Contents(value)] if _is_container(value) else [])]


# -- places that nobody has written to --------------------------------------------------------------------------------


class _QuietNames:
    """Names of one module or class that nobody has written to yet; looked at together.

    Args:
        places: the places of these names, by number.

    Attributes:
        get: gives the values of the names that are bound, of ``namespace``.
        values: what it gave at first.
        absent: the names that are not bound.
    """

    def __init__(self, places: dict[int, _Name]) -> None:
        self._places = places
        self.namespace = vars(next(iter(places.values())).holder)
        present = [place.name for place in places.values() if place.name in self.namespace]
        self.absent = [place.name for place in places.values() if place.name not in self.namespace]
        # itemgetter gives a tuple only for two names or more
        self.get = itemgetter("__doc__", *(present or ["__doc__"]))
        self.values = self.get(self.namespace)
        self._first = {number: place.read() for number, place in places.items()}

    def changed(self) -> list[int]:
        """The numbers of the places that have been written to."""
        return [number for number, place in self._places.items() if place.read() is not self._first[number]]

    def without(self, numbers: list[int]) -> list[_QuietNames]:
        """The rest of these names."""
        rest = {number: place for number, place in self._places.items() if number not in numbers}
        return [_QuietNames(rest)] if rest else []


# -- all of them ------------------------------------------------------------------------------------------------------


class LibraryState:
    """The listed state of all libraries that are loaded, for the ranks of one run."""

    def __init__(self, libraries: Sequence[Library] = LIBRARIES) -> None:
        self._libraries = {library.name: library for library in libraries}
        self._found: set[str] = set()
        self._prepared: set[str] = set()
        self._places: list[Any] = []
        self._original: list[Any] = []
        self._pristine: list[Any] = []
        self._states: list[dict[int, Any]] = []
        self._moving: list[int] = []
        self._quiet_names: list[_QuietNames] = []
        self._empty: dict[int, Any] = {}
        self._quiet: dict[int, Any] = {}
        self._watch_names([])
        self._watch_containers()

    def matches(self, module: str) -> bool:
        """Whether a module of this name belongs to a listed library."""
        return module.partition(".")[0] in self._libraries

    def begin(self) -> None:
        """Remember what is loaded now."""
        self._find_places()

    def end(self) -> None:
        """Give the libraries back what they held before the run, or, imported during it, after their import."""
        for place, contents in zip(self._places, self._original, strict=True):
            place.write(contents)

    def new_state(self) -> dict[int, Any]:
        """The state of a rank that starts now: by number of the place, for places that somebody has written to."""
        state: dict[int, Any] = {}
        self._states.append(state)
        return state

    def save(self, state: dict[int, Any]) -> None:
        """Read what the running rank leaves behind."""
        if not self._is_quiet():
            self._move_what_changed()
        for number in self._moving:
            state[number] = self._places[number].read()

    def load(self, state: dict[int, Any]) -> None:
        """Write what the rank that runs next has."""
        for number in self._moving:
            contents = state.get(number, _MISSING)
            if contents is _MISSING:
                contents = state[number] = self._places[number].fresh(self._pristine[number])
            self._places[number].write(contents)

    def read(self) -> list[Any]:
        """What the running rank has in all places."""
        return [place.read() for place in self._places]

    def spread(self, before: list[Any], mine: dict[int, Any]) -> None:
        """A rank has imported something: what that changed since ``before`` is changed for all ranks.

        Args:
            before: what :meth:`read` gave before the import.
            mine: the state of the rank that did it.
        """
        for number, old in enumerate(before):
            place = self._places[number]
            new = place.read()
            self._pristine[number] = place.merge(self._pristine[number], old, new)
            for state in self._states:
                if state is not mine and number in state:
                    state[number] = place.merge(state[number], old, new)
        self._find_places()

    # -- inside -------------------------------------------------------------------------------------------------

    def _is_quiet(self) -> bool:
        """Whether nobody has written to a place that was left alone so far; asked at every switch, in few calls."""
        try:
            return (
                list(map(call, self._gets, self._namespaces)) == self._values
                and not any(map(call, self._have, self._absent))
                and not any(self._empty_containers)
                and self._quiet_containers == self._quiet_contents
                and not any(place.changed() for place in self._quiet_others)
            )
        except Exception:  # noqa: BLE001 - deleted, or objects that cannot be compared
            return False

    def _move_what_changed(self) -> None:
        self._move_names()
        self._move([number for number, place in self._empty.items() if place.container])
        self._move([number for number in self._quiet if self._has_changed(number)])

    def _move_names(self) -> None:
        for names in self._quiet_names:
            numbers = names.changed()
            if numbers:
                self._moving += numbers
                others = [other for other in self._quiet_names if other is not names]
                self._watch_names([*others, *names.without(numbers)])

    def _watch_names(self, quiet: list[_QuietNames]) -> None:
        self._quiet_names = quiet
        self._gets = [names.get for names in quiet]
        self._namespaces = [names.namespace for names in quiet]
        self._values = [names.values for names in quiet]
        self._have = [names.namespace.__contains__ for names in quiet for _ in names.absent]
        self._absent = [name for names in quiet for name in names.absent]

    def _has_changed(self, number: int) -> bool:
        place = self._places[number]
        if not isinstance(place, _Contents):
            return bool(place.changed())
        try:
            return bool(place.container != self._quiet[number])
        except Exception:  # noqa: BLE001 - objects in it cannot be compared
            return True

    def _move(self, numbers: list[int]) -> None:
        self._moving += numbers
        for number in numbers:
            self._empty.pop(number, None)
            self._quiet.pop(number, None)
        self._watch_containers()

    def _watch_containers(self) -> None:
        self._empty_containers = [place.container for place in self._empty.values()]
        contents = {number: place for number in self._quiet if isinstance(place := self._places[number], _Contents)}
        self._quiet_containers = [place.container for place in contents.values()]
        self._quiet_contents = [self._quiet[number] for number in contents]
        self._quiet_others = [self._places[number] for number in self._quiet if number not in contents]

    def _find_places(self) -> None:
        """Find the places of all modules that are loaded by now."""
        first = len(self._places)
        for library in self._libraries.values():
            for name, paths in library.state.items():
                full = f"{library.name}.{name}" if name else library.name
                module = sys.modules.get(full)
                if module is not None and full not in self._found:
                    self._found.add(full)
                    self._places += [place for path in paths for place in _places(module, path)]
                    if name in library.special:
                        self._places.append(library.special[name](module))
        self._original += [place.fresh(place.read()) for place in self._places[first:]]
        for library in self._libraries.values():
            if library.name in sys.modules and library.name not in self._prepared:
                self._prepared.add(library.name)
                _tell(library)
                if library.prepare is not None:
                    library.prepare()
        self._pristine += [place.fresh(place.read()) for place in self._places[first:]]
        self._watch(first)

    def _watch(self, first: int) -> None:
        """Begin to look whether anybody writes to the places from number ``first`` on."""
        holders: dict[int, dict[int, _Name]] = {}
        for number, place in enumerate(self._places[first:], first):
            if isinstance(place, _Name):
                holders.setdefault(id(place.holder), {})[number] = place
            elif isinstance(place, _Contents) and not place.container:
                self._empty[number] = place
            else:
                self._quiet[number] = self._pristine[number]
                if isinstance(place, _Contents) and isinstance(place.container, (set, deque)):
                    self._quiet[number] = type(place.container)(self._pristine[number])
        self._watch_names([*self._quiet_names, *map(_QuietNames, holders.values())])
        self._watch_containers()


def _tell(library: Library) -> None:
    notice = library.notice(sys.modules[library.name].__version__)
    if notice and notice not in _told:
        _told.add(notice)
        warnings.warn(notice, SimWarning, stacklevel=2)


_told: set[str] = set()
