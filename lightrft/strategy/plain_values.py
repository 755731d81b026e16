"""What was given, as Python's own values: numbers of NumPy and scalars of torch too, but no text and no other type."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Mapping
from typing import Any

from lightrft.strategy.sources import ReadOnlyMapping

__all__ = ["biases", "integer", "mapping", "number", "switch", "texts", "token_ids"]


def integer(value: Any) -> int:
    """An integer.

    Raises:
        TypeError, ValueError, RuntimeError: it is none; ``True`` and ``"3"`` are none either.
    """
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool):
        raise TypeError(f"{value!r} is no integer")
    return operator.index(plain)


def number(value: Any) -> float:
    """A number; an ``int`` stays one.

    Raises:
        TypeError: it is none.
    """
    if type(value) in (int, float):
        return value  # type: ignore[no-any-return]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def switch(value: Any) -> bool:
    """``True`` or ``False``.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither True nor False")
    return value


def texts(value: Any) -> tuple[str, ...]:
    """Several texts, or one; those of a set in their order.

    Raises:
        TypeError: something else is among them.
    """
    found = (value,) if isinstance(value, str) else _several(value)
    if not all(isinstance(each, str) for each in found):
        raise TypeError("something among them is no text")
    return found


def token_ids(value: Any) -> tuple[int, ...]:
    """Several token ids: a sequence, an array or a tensor of integers; those of a set in their order.

    Raises:
        TypeError, ValueError, RuntimeError: something else is among them.
    """
    if isinstance(value, (str, bytes)):
        raise TypeError("a text has no token ids")
    found = _several(value.tolist() if hasattr(value, "tolist") else value)
    return found if list(map(type, found)).count(int) == len(found) else tuple(map(integer, found))


def biases(value: Any) -> Mapping[int, float]:
    """A mapping from token ids to numbers, which nobody can change. SGLang writes token ids as texts.

    Raises:
        TypeError, ValueError, RuntimeError: it is something else.
    """
    if isinstance(value, ReadOnlyMapping):
        return value
    given = mapping(value)
    return ReadOnlyMapping(
        {int(token) if isinstance(token, str) else integer(token): number(bias) for token, bias in given.items()}
    )


def mapping(value: Any) -> ReadOnlyMapping[Any, Any]:
    """A mapping, which nobody can change.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, ReadOnlyMapping):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r:.100} is no mapping")
    return ReadOnlyMapping(value)


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
