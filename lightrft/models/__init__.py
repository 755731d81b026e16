"""Tiny models to try things on.

Importing this package loads nothing else; each name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.models.tiny import tiny_text_model as tiny_text_model
    from lightrft.models.tiny import tiny_vision_model as tiny_vision_model

__all__ = [
    "tiny_text_model",
    "tiny_vision_model",
]

_HOMES = {
    "tiny_text_model": "tiny",
    "tiny_vision_model": "tiny",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
