"""``functools.cached_property`` with a lock for each rank.

Up to Python 3.11 one lock per property is held while its function runs, for whatever object. Shared by all ranks, it
would keep the others out when a rank meets them inside the function. Python 3.12 has no such lock.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch
from lightrft.sim.threads import SimRLock

if TYPE_CHECKING:
    from lightrft.sim.rank import SimRank

__all__ = ["patches"]

_MISSING = object()
_locks: WeakKeyDictionary[SimRank, dict[int, SimRLock]] = WeakKeyDictionary()


def _getter(original: Any) -> Any:
    def get(self: Any, instance: Any, owner: type | None = None) -> Any:
        task = current_task()
        if task is None or instance is None or self.attrname is None:
            return original(self, instance, owner)
        cache = getattr(instance, "__dict__", None)
        if cache is None:
            return original(self, instance, owner)
        value = cache.get(self.attrname, _MISSING)
        if value is not _MISSING:
            return value
        locks = _locks.setdefault(task.rank, {})
        with locks.setdefault(id(self), SimRLock()):
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
