"""What the functions of a user's module do to state of the process, module by module."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from lightrft.sim.bytecode import nested, uses_of, words
from lightrft.sim.places import is_user_file

__all__ = [
    "Modules",
    "Parts",
    "Survey",
    "full_name",
    "merged",
    "parts_of",
    "rank_read_by",
    "survey_of",
    "user_modules",
]

_CONSTRUCTORS = frozenset({"__init__", "__post_init__", "__setstate__", "__set_name__"})
_ON_CLASSES = frozenset({"__new__", "__init_subclass__", "__class_getitem__"})

_RANK_READERS = words(
    "get_rank get_world_size get_node_local_rank get_local_rank get_group_rank get_global_rank get_coordinate "
    "get_process_group_ranks init_process_group new_group new_subgroups new_subgroups_by_enumeration split_group "
    "init_device_mesh DeviceMesh current_device"
)
_ENVIRONMENT = frozenset({"environ", "getenv"})
_RANK_VARIABLES = words(
    "RANK LOCAL_RANK GROUP_RANK ROLE_RANK SLURM_PROCID SLURM_LOCALID OMPI_COMM_WORLD_RANK CUDA_VISIBLE_DEVICES"
)
_MOST_CALLS = 200


class Survey(NamedTuple):
    """What some functions do.

    Attributes:
        rebound: as in :class:`~lightrft.sim.bytecode.Uses`, and so are ``names`` and ``attributes``.
        assigned: attributes that they assign to something else than their first parameter.
        assigned_of: the same by the name of what they assign them to.
        on_instances: by full name of a class, attributes that its methods assign to the instance, constructors aside.
        on_classes: by full name of a class, attributes that its methods assign to the class.
    """

    rebound: set[str]
    names: dict[str, int]
    attributes: dict[str, int]
    assigned: set[str]
    assigned_of: dict[str, set[str]]
    on_instances: dict[str, set[str]]
    on_classes: dict[str, set[str]]


_surveys: WeakKeyDictionary[ModuleType, tuple[int, Survey]] = WeakKeyDictionary()


Modules = list[tuple[str, ModuleType]]


_latest: tuple[dict[str, ModuleType], Modules] = ({}, [])
"""All modules that were imported when somebody asked last, and the user's among them."""


def user_modules() -> Modules:
    """The user's own modules that are imported now, by name."""
    global _latest  # noqa: PLW0603 - most runs of a process find the same modules
    if sys.modules != _latest[0]:
        imported = sys.modules.copy()
        found = [
            (name, module)
            for name, module in imported.items()
            if is_user_file(getattr(module, "__dict__", {}).get("__file__"))
        ]
        _latest = imported, found
    return _latest[1]


def survey_of(module: ModuleType) -> Survey:
    """The survey of one module; made when it is first seen, and again when it has more or fewer names."""
    known = _surveys.get(module)
    if known is None or known[0] != len(vars(module)):
        known = _surveys[module] = (len(vars(module)), _survey(module))
    return known[1]


def merged(surveys: Iterable[Survey]) -> Survey:
    """Several modules as one."""
    total = Survey(set(), {}, {}, set(), {}, {}, {})
    for survey in surveys:
        total.rebound.update(survey.rebound)
        total.assigned.update(survey.assigned)
        for owner, attributes in survey.assigned_of.items():
            total.assigned_of.setdefault(owner, set()).update(attributes)
        total.on_instances.update(survey.on_instances)
        total.on_classes.update(survey.on_classes)
        _raise_to(total.names, survey.names)
        _raise_to(total.attributes, survey.attributes)
    return total


def _raise_to(total: dict[str, int], levels: dict[str, int]) -> None:
    for name, level in levels.items():
        total[name] = max(total.get(name, 0), level)


def _survey(module: ModuleType) -> Survey:
    found = Survey(set(), {}, {}, set(), {}, {}, {})
    for member in vars(module).copy().values():
        for function in _functions(member, module):
            _note(found, function.__code__, None)
    for cls in _classes_of(module):
        for name, member in vars(cls).copy().items():
            on_class = isinstance(member, classmethod) or name in _ON_CLASSES
            where = None if name in _CONSTRUCTORS else (found.on_classes if on_class else found.on_instances)
            for function in _functions(member, module):
                _note(found, function.__code__, None if where is None else where.setdefault(full_name(cls), set()))
    return found


def _note(found: Survey, code: CodeType, on_first: set[str] | None) -> None:
    for each in nested(code):
        uses = uses_of(each)
        found.rebound.update(uses.rebound)
        for owner, attribute in uses.stored:
            found.assigned.add(attribute)
            found.assigned_of.setdefault(owner, set()).add(attribute)
        _raise_to(found.names, uses.names)
        _raise_to(found.attributes, uses.attributes)
        if on_first is not None and each is code:
            on_first.update(uses.stored_on_first)


def full_name(cls: type) -> str:
    """Module and qualified name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _classes_of(module: ModuleType) -> Iterator[type]:
    """The classes that are defined in ``module``, those inside classes too."""
    waiting = [value for value in list(vars(module).values()) if isinstance(value, type)]
    seen: set[type] = set()
    while waiting:
        cls = waiting.pop()
        if cls.__module__ == module.__name__ and cls not in seen:
            seen.add(cls)
            yield cls
            waiting += [value for value in list(vars(cls).values()) if isinstance(value, type)]


class Parts(NamedTuple):
    """What one module consists of.

    Attributes:
        classes: those that are defined in it, those inside classes too.
        functions: its functions and methods, by qualified name.
        caches: those of them with ``functools.lru_cache``.
        objects: the globals that are bound to neither a definition nor plain data.
    """

    classes: tuple[type, ...]
    functions: tuple[tuple[str, FunctionType], ...]
    caches: tuple[tuple[str, Any], ...]
    objects: tuple[str, ...]


_DEFINITIONS = (FunctionType, BuiltinFunctionType, ModuleType, type)
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes, tuple, frozenset, torch.dtype, re.Pattern})


def _is_object(name: str, value: Any) -> bool:
    return not (type(value) in _PLAIN or isinstance(value, _DEFINITIONS) or _DUNDER.fullmatch(name))


_DUNDER = re.compile("__.*__")
_parts: WeakKeyDictionary[ModuleType, tuple[list[Any], Parts]] = WeakKeyDictionary()
_latest_parts: list[tuple[Modules, list[Any], list[Parts]]] = []


def parts_of(modules: Modules) -> list[Parts]:
    """What each of ``modules`` consists of; looked up anew where a name of it or of its classes is bound anew."""
    if _latest_parts:
        same, bindings, found = _latest_parts[0]
        if same is modules and bindings == _bindings(modules, found):  # all at once: this is asked at every run
            return found
    found = [_parts_of(name, module) for name, module in modules]
    _latest_parts[:] = [(modules, _bindings(modules, found), found)]
    return found


def _parts_of(name: str, module: ModuleType) -> Parts:
    known = _parts.get(module)
    if known is None or known[0] != _bindings([(name, module)], [known[1]]):
        members = list(_named_members(module))
        cached = functools._lru_cache_wrapper
        parts = Parts(
            classes=tuple(_classes_of(module)),
            functions=tuple((name, member) for name, member in members if isinstance(member, FunctionType)),
            caches=tuple((name, member) for name, member in members if isinstance(member, cached)),
            objects=tuple(name for name, value in vars(module).copy().items() if _is_object(name, value)),
        )
        known = _parts[module] = _bindings([(name, module)], [parts]), parts
    return known[1]


def _bindings(modules: Modules, parts: list[Parts]) -> list[Any]:
    """What the names of modules and of their classes are bound to, without holding on to any of it but types."""
    namespaces: list[Any] = [vars(module) for _, module in modules]
    namespaces += [vars(cls) for each in parts for cls in each.classes]
    names = list(chain.from_iterable(namespaces))
    values = list(chain.from_iterable([namespace.values() for namespace in namespaces]))
    return [names, list(map(id, values)), list(map(type, values))]


def _named_members(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions, methods and caches of ``module``, by qualified name."""
    for name, member in vars(module).copy().items():
        if getattr(member, "__module__", None) == module.__name__:
            yield name, member
    for cls in _classes_of(module):
        for name, member in vars(cls).copy().items():
            yield f"{cls.__qualname__}.{name}", getattr(member, "__func__", member)


def _functions(member: Any, module: ModuleType) -> Iterator[FunctionType]:
    """The functions behind a member of a module or class: itself, and what decorators have wrapped."""
    if isinstance(member, property):
        parts: tuple[Any, ...] = (member.fget, member.fset, member.fdel)
    elif isinstance(member, functools.cached_property):
        parts = (member.func,)
    else:
        parts = (getattr(member, "__func__", member),)
    for part in parts:
        for _ in range(10):  # decorators
            if isinstance(part, FunctionType) and part.__module__ == module.__name__:
                yield part
            wrapped = getattr(part, "__dict__", {}).get("__wrapped__") if part is not None else None
            if wrapped is None:
                break
            part = wrapped  # noqa: PLW2901 - one decorator deeper


def rank_read_by(function: Any) -> str:
    """What ``function``, or a function of the user's that it calls, reads that is another on each rank; empty if none.

    A world size is among it: the next run may have another one.
    """
    waiting, seen = [function], set[int]()
    while waiting and len(seen) < _MOST_CALLS:
        each = waiting.pop(0)
        if not isinstance(each, FunctionType) or id(each) in seen or not is_user_file(each.__code__.co_filename):
            continue
        seen.add(id(each))
        for code in nested(each.__code__):
            uses = uses_of(code)
            found = sorted(uses.mentioned & _RANK_READERS)
            if not found and uses.mentioned & _ENVIRONMENT:
                found = [f"the environment variable {name}" for name in sorted(uses.mentioned & _RANK_VARIABLES)]
            if found:
                return found[0]
            waiting.extend(each.__globals__.get(name) for name in uses.names)
    return ""
