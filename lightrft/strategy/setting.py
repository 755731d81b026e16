"""One setting of a configuration: its default, its help text and the values it allows."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightrft.errors import ConfigError

__all__ = ["Setting", "any_of", "setting", "settings_of"]

_KINDS = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is known of one setting beside its name.

    Args:
        group: the heading under which its flag is listed.
        help: what it does, for people; without the default, which is added where it is shown.
        kind: the type of its value; ``tuple`` is a tuple of as many floats as the default has.
        default: the value without a word from the user; ``None`` allows ``None``.
        choices: the only values allowed; empty allows all of the kind.
        at_least, above, at_most, below: the range of a number, or of each number of a tuple.
        refused: why a value that one may expect is not among the choices.
        off_flag: the flag that turns a setting off that is on by default.
    """

    group: str
    help: str
    kind: type
    default: Any
    choices: tuple[Any, ...] = ()
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    refused: Mapping[Any, str] = field(default_factory=dict)
    off_flag: str | None = None

    def checked(self, name: str, value: Any) -> Any:
        """``value`` as the setting keeps it: numbers as plain ``int`` and ``float``, a list as a tuple.

        Raises:
            ConfigError: if it is of another type, or not allowed.
        """
        if value is None and self.default is None:
            return None
        if self.kind is not tuple:
            return self._one(name, value)
        length = len(self.default)
        if not isinstance(value, list | tuple) or len(value) != length:
            raise ConfigError(f"{name}={value!r}: expected {self.values()}, such as {self.default}")
        return tuple(self._number(name, each, float) for each in value)

    def _one(self, name: str, value: Any) -> Any:
        if self.kind in {int, float}:
            value = self._number(name, value, self.kind)
        elif not isinstance(value, self.kind):
            raise ConfigError(self._wrong_type(name, value, _KINDS[self.kind]))
        if self.choices and value not in self.choices:
            raise ConfigError(f"{name}={value!r}: expected {self.values()}{self._reason(value)}")
        if value == "":
            raise ConfigError(f"{name}='': expected a string that is not empty, or None")
        return value

    def _reason(self, value: Any) -> str:
        return f" ({self.refused[value]})" if value in self.refused else ""

    def _number(self, name: str, value: Any, kind: type) -> Any:
        known = numbers.Integral if kind is int else numbers.Real
        if isinstance(value, bool) or not isinstance(value, known):
            raise ConfigError(self._wrong_type(name, value, _KINDS[kind]))
        value = kind(value)
        if (kind is float and not math.isfinite(value)) or not self._within(value):
            raise ConfigError(f"{name}={value!r}: expected {self.values()}")
        return value

    def _within(self, value: float) -> bool:
        return (
            (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def switched_off(self, value: Any) -> bool:
        """Whether ``value``, given for ``off_flag``, switches the setting off; ``None`` stands for no such value."""
        if value is None or isinstance(value, bool):
            return bool(value)
        raise ConfigError(self._wrong_type(str(self.off_flag), value, _KINDS[bool]))

    def values(self) -> str:
        """The values that are allowed, in words: ``"a number, above 0, at most 1"``."""
        if self.choices:
            return any_of(self.choices)
        kind = f"{len(self.default)} numbers" if self.kind is tuple else _KINDS[self.kind]
        ends = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return ", ".join([kind, *(f"{end} {value}" for end, value in ends.items() if value is not None)])

    def _wrong_type(self, name: str, value: Any, expected: str) -> str:
        message = f"{name}={value!r}: expected {expected}, got {type(value).__name__}"
        if not isinstance(value, str):
            return message
        return f"{message}: convert it first (the environment holds strings, and YAML reads 1e-6 as one)"


def any_of(choices: Iterable[Any]) -> str:
    """``"1, 2 or 3"``: the values that are allowed, in words."""
    *first, last = [str(choice) for choice in choices]
    return f"{', '.join(first)} or {last}" if first else last


def setting(default: Any, group: str, text: str, **limits: Any) -> Any:
    """A dataclass field that carries a ``Setting``. A default of ``None`` stands for an optional string."""
    kind = str if default is None else type(default)
    metadata = {"setting": Setting(group=group, help=text, kind=kind, default=default, **limits)}
    return field(default=default, metadata=metadata)


def settings_of(config: Any) -> dict[str, Setting]:
    """Every setting of a configuration (or of its class) by name, in the order in which they are written."""
    found = {field.name: field.metadata.get("setting") for field in dataclasses.fields(config)}
    return {name: known for name, known in found.items() if known is not None}
