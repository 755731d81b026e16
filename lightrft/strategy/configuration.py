"""What configurations have in common: settings that are checked when they are built, and read from many sources."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from lightrft.errors import ConfigError
from lightrft.strategy.setting import Setting, any_of, settings_of
from lightrft.strategy.sources import ReadOnlyMapping, entries

__all__ = ["Configuration"]


class Configuration:
    """Base of frozen dataclasses whose fields are made by ``setting``, and of which one is ``extra_args``.

    A subclass may say which settings follow from others, and which contradict each other.

    Raises:
        ConfigError: if a value has another type or is not allowed, or two settings contradict each other. The message
            names all that is wrong, one problem a line.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    extra_args: Mapping[str, Any]
    """Entries that are no settings, read-only; ``get_extra_arg`` reads one."""

    def __post_init__(self) -> None:
        problems = list(self._take_checked())
        if not problems:
            self._follow()
            problems = list(self._contradictions())
        if problems:
            raise ConfigError("\n".join(problems))

    @classmethod
    def from_args(cls, source: Any = None, **overrides: Any) -> Self:
        """The configuration that ``source`` describes.

        ``None`` for a setting that cannot be ``None`` means that it was not given. Entries that are no settings go to
        ``extra_args``. A setting's off-flag (``disable_engine_sleep``) is understood as on the command line.

        Args:
            source: parsed arguments, a mapping, an object with attributes, another configuration, or ``None``.
            overrides: settings, or extra entries of ``source``, that win over what ``source`` says.

        Raises:
            ConfigError: if ``source`` cannot be read, an override is unknown, or the configuration cannot be built.
        """
        given = cls._given(cls._entries(source))
        extra = given["extra_args"]
        changed = cls._given(overrides)
        unknown = [name for name in overrides if name in changed["extra_args"] and name not in extra]
        if unknown:
            raise ConfigError(cls._unknown(unknown[0]))
        return cls(**{**given, **changed, "extra_args": {**extra, **changed["extra_args"]}})

    def replace(self, **changes: Any) -> Self:
        """Another configuration with ``changes``, checked as a new one.

        Raises:
            ConfigError: if a name is unknown, or the configuration cannot be built.
        """
        for name in changes:
            if name not in self._names():
                raise ConfigError(self._unknown(name))
        return type(self)(**{**{name: getattr(self, name) for name in self._names()}, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ``extra_args`` as a dict of its own; ``from_args`` reads it back."""
        return {name: getattr(self, name) for name in self._names()} | {"extra_args": dict(self.extra_args)}

    def get_extra_arg(self, name: str, default: Any = None) -> Any:
        """The entry ``name`` that is no setting, else ``default``; the name of a setting gives that setting."""
        return getattr(self, name) if name in settings_of(self) else self.extra_args.get(name, default)

    def summary(self) -> str:
        """What differs from the defaults, one setting a line, and the names of the extra entries."""
        lines = [f"  {name} = {value!r} (default: {known.default!r})" for name, value, known in self._changed()]
        if self.extra_args:
            lines.append(f"  extra_args: {', '.join(self.extra_args)}")
        name = type(self).__name__
        return "\n".join([f"{name}, what differs from the defaults:", *lines]) if lines else f"{name}: all defaults"

    def __repr__(self) -> str:
        words = [f"{name}={value!r}" for name, value, _ in self._changed()]
        if self.extra_args:
            words.append(f"extra_args=<{', '.join(self.extra_args)}>")
        return f"{type(self).__name__}({', '.join(words)})"

    def _changed(self) -> list[tuple[str, Any, Setting]]:
        known = [(name, getattr(self, name), each) for name, each in settings_of(self).items()]
        return [(name, value, each) for name, value, each in known if value != each.default]

    def _take_checked(self) -> Iterator[str]:
        """Put checked values in place of the given ones; what is wrong with those that cannot be taken."""
        for name, known in settings_of(self).items():
            try:
                object.__setattr__(self, name, known.checked(name, getattr(self, name)))
            except ConfigError as error:
                yield str(error)
        try:
            object.__setattr__(self, "extra_args", ReadOnlyMapping(entries(self.extra_args, ())))
        except ConfigError as error:
            yield f"extra_args: {error}"
            return
        for name in self.extra_args:
            if name in self._names():
                yield f"extra_args has {name!r}, which is a setting: give it as {name}=..."

    def _follow(self) -> None:
        """Set what follows from other settings, once all of them are checked."""

    def _contradictions(self) -> Iterator[str]:
        """A sentence for each pair of settings that cannot hold together."""
        return iter(())

    @classmethod
    def _names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls) if field.init]

    @classmethod
    def _entries(cls, source: Any) -> dict[str, Any]:
        """What ``source`` says; what another configuration keeps as extra may be settings of this one."""
        if not isinstance(source, Configuration):
            return entries(source, cls._names())
        found = source.to_dict()
        return found if isinstance(source, cls) else {**found.pop("extra_args"), **found}

    @classmethod
    def _given(cls, found: Mapping[str, Any]) -> dict[str, Any]:
        """What ``found`` says of each field; its unknown entries beside those of its ``extra_args``."""
        rest = dict(found)
        known = settings_of(cls)
        given = {}
        for name in cls._names():
            if name in rest and not (rest[name] is None and (name not in known or known[name].default is not None)):
                given[name] = rest[name]
            rest.pop(name, None)
        for name, each in known.items():
            if each.off_flag is not None and each.switched_off(rest.pop(each.off_flag, None)):
                given[name] = False
        given["extra_args"] = {**entries(given.get("extra_args"), ()), **rest}
        return given

    @classmethod
    def _unknown(cls, name: str) -> str:
        near = difflib.get_close_matches(name, cls._names(), n=3)
        hint = f"did you mean {any_of(near)}" if near else f"expected one of {', '.join(cls._names())}"
        return f"{name!r} is no setting: {hint}; an entry of your own goes into extra_args={{{name!r}: ...}}"
