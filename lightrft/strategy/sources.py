"""Reads settings from what trainers pass around: a Namespace, a mapping, an object with attributes."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from lightrft.errors import ConfigError

__all__ = ["ReadOnlyMapping", "entries"]

_NO_SOURCE = (str, bytes, bool, int, float, complex, list, tuple, set, frozenset)


Key = TypeVar("Key")
Value = TypeVar("Value")


class ReadOnlyMapping(Mapping[Key, Value]):
    """A mapping that nobody can change; its values are those that were given, not copies.

    It can be hashed if its values can.
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[Key, Value]) -> None:
        self._entries = dict(entries)

    def __getitem__(self, name: Key) -> Value:
        return self._entries[name]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return repr(self._entries)


def entries(source: Any, names: Collection[str]) -> dict[str, Any]:
    """Every entry of ``source`` by name.

    A mapping, or what has ``keys()`` and ``[]`` as one, gives its items. Any other object gives its attributes: those
    of the instance, those of its class that are plain values (no functions, classes or modules), and the properties
    that are called as one of ``names``; other properties are left alone, because reading one may start something.
    Names with a leading underscore are no entries. ``None`` has none.

    Raises:
        ConfigError: if ``source`` is a list, a string or a number, or a key is no string.
    """
    if source is None:
        return {}
    if isinstance(source, _NO_SOURCE):
        raise ConfigError(
            f"got {type(source).__name__} {repr(source)[:60]}: expected parsed arguments (argparse.Namespace), a "
            f"mapping, an object with attributes, a StrategyConfig or None"
        )
    if isinstance(source, Mapping) or (hasattr(type(source), "keys") and hasattr(type(source), "__getitem__")):
        return _items(source)
    return _attributes(source, names)


def _items(source: Any) -> dict[str, Any]:
    items = {key: source[key] for key in source.keys()}  # noqa: SIM118 - not every such object can be iterated
    odd = [key for key in items if not isinstance(key, str)]
    if odd:
        raise ConfigError(f"key {odd[0]!r} is a {type(odd[0]).__name__}: expected the name of a setting, a string")
    return items


def _attributes(source: Any, names: Collection[str]) -> dict[str, Any]:
    own = {} if inspect.isclass(source) or inspect.ismodule(source) else getattr(source, "__dict__", {})
    found = {name: value for name, value in own.items() if not name.startswith("_")}
    listed = [name for name in dir(source) if not name.startswith("_")]
    plain = [name for name in listed if _is_plain(inspect.getattr_static(source, name, None))]
    # Those in names may also be properties, or answered by __getattr__; a slot may be empty.
    missing = object()
    others = {name: getattr(source, name, missing) for name in [*plain, *names] if name not in found}
    return found | {name: value for name, value in others.items() if value is not missing}


def _is_plain(static: Any) -> bool:
    """Whether an attribute of a class is a value: no function, class, module or descriptor but that of a slot."""
    if inspect.ismemberdescriptor(static):
        return True
    return not (callable(static) or inspect.ismodule(static) or hasattr(type(static), "__get__"))
