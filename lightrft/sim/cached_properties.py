"""``functools.cached_property`` without its lock.

Up to Python 3.11 one lock per property is held while its function runs, by whatever object. In a process that is one
rank nobody notices; here a rank that meets the others inside the function would keep them out. Python 3.12 has no such
lock, and inside a world neither has 3.11.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch

__all__ = ["patches"]

_MISSING = object()


def _getter(original: Any) -> Any:
    def get(self: Any, instance: Any, owner: type | None = None) -> Any:
        if instance is None or self.attrname is None or current_task() is None:
            return original(self, instance, owner)
        cache = getattr(instance, "__dict__", None)
        if cache is None:
            return original(self, instance, owner)
        value = cache.get(self.attrname, _MISSING)
        if value is _MISSING:
            value = self.func(instance)
            try:
                cache[self.attrname] = value
            except TypeError:
                return original(self, instance, owner)  # which says that the object cannot keep it
        return value

    return get


_PATCHES = [] if sys.version_info >= (3, 12) else [Patch(functools.cached_property, "__get__", _getter)]


def patches() -> list[Patch]:
    """The replacement, where one is needed."""
    return _PATCHES
