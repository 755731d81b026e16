"""What the fake engine lacks: refused by name, with what to do instead, and never passed over."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any, ClassVar

from lightrft.errors import ConfigError

__all__ = [
    "CODE", "MEMORY", "ORDER", "RETURNED", "SPEED", "LackingModuleError", "LackingNameError", "Refusing", "Surface",
    "lacks", "lacks_text",
]  # fmt: skip

# Why names change no result, see ``Surface.idle``.
MEMORY = "how much memory is taken"
SPEED = "how it is computed"
ORDER = "when requests are computed: completions do not depend on it"
RETURNED = "when results are returned: a call returns them all at its end"
CODE = "whether code of a model may run: models are those of transformers"


class LackingNameError(ConfigError, AttributeError):
    """The fake engine has nothing of that name."""


class LackingModuleError(ConfigError, ModuleNotFoundError):
    """The fake engine has no such module, or nothing of that name in it to import.

    It tells no ``name``: one that does is passed over by ``from module import name``, for an error that says less.
    """


class Refusing:
    """Attributes that a class lacks are refused by name."""

    __slots__ = ()
    _engine: ClassVar[str]

    def __getattr__(self, name: str) -> Any:
        raise LackingNameError(lacks(self._engine, f"{type(self).__name__}.{name}"))


def lacks(engine: str, what: str, instead: str = "leave it out") -> str:
    """That the fake engine lacks something, and what to do.

    Args:
        engine: whose face is asked, ``vLLM`` or ``SGLang``.
        what: is lacking, as the user wrote it.
        instead: what to do.
    """
    return (
        f"the fake {engine} engine has no {what}: {instead}, or run with the installed package, by "
        "SimWorld(engines=False) or `lightrft sim --engines installed`"
    )


def lacks_text(engine: str, what: str) -> str:
    """The same of what needs the text of a completion, where the engine has no tokenizer."""
    return (
        f"{what} needs the text of completions, and the fake {engine} engine was made without a tokenizer, as the real "
        "one can be: use stop_token_ids, or leave skip_tokenizer_init out and put a tokenizer beside the model"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Surface:
    """Arguments or fields of a real engine, and what the fake one makes of each.

    What is in neither list is refused unless it has its default.

    Attributes:
        engine: ``vLLM`` or ``SGLang``.
        honoured: names that do what they do in the real engine.
        idle: names that change no result, and why; any value is taken.
        values: the only values that are taken of some of the honoured.
    """

    engine: str
    honoured: frozenset[str]
    idle: Mapping[str, str]
    values: Mapping[str, Collection[Any]] = field(default_factory=dict)

    def check(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        """Refuse what is lacking.

        Args:
            given: by name.
            defaults: of the real engine, by name; a name that has none is refused whatever its value.

        Raises:
            ConfigError: something is lacking; the message names all of it.
        """
        lacking = list(self._lacking(given, defaults))
        if lacking:
            raise ConfigError(lacks(self.engine, ", ".join(lacking)))

    def _lacking(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[str]:
        for name, value in given.items():
            if name in self.idle or (name in self.honoured and name not in self.values):
                continue
            if (name in defaults and _same(value, defaults[name])) or value in self.values.get(name, ()):
                continue
            yield f"{name}={value!r:.80}"


def _same(value: Any, default: Any) -> bool:
    """Whether a value says nothing that its default does not: nothing at all, or the same."""
    if default is None:
        return value is None or (isinstance(value, (bool, str, Sized)) and not value)
    return type(value) is type(default) and bool(value == default)
