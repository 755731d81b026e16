"""One thing of a user's module that is watched, and what is told when two ranks have written to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightrft.sim.contents import Contents, is_instance, mark

__all__ = ["Watched", "WatchedCache"]

_MISSING = object()


class Watched:
    """A name in some namespace, what it is bound to, and the contents of that."""

    def __init__(self, module: str, name: str, what: str, namespace: Mapping[str, Any], key: str) -> None:
        self.module = module
        self.label = f"{module}.{name}"
        self.what = what
        self.namespace = namespace
        self.key = key
        self.writers: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Take what there is now for unchanged."""
        value = self.namespace.get(self.key, _MISSING)
        self.contents = Contents()
        self.contents.add(value)
        self.last = mark(value), self.contents.look()

    def changed(self) -> bool:
        """Whether somebody has written to it since."""
        return (mark(self.namespace.get(self.key, _MISSING)), self.contents.look()) != self.last

    def matters(self) -> bool:
        """Whether it matters that ranks share it."""
        return True

    def warning(self) -> str:
        """What to tell when two ranks have written to it."""
        first, second = sorted(self.writers)
        return (
            f"{self.label} is one {self.what} for all simulated ranks, and ranks {first} and {second} wrote to it; on "
            f"a cluster each rank has its own. If that matters, {self._advice()}"
        )

    def _advice(self) -> str:
        value = self.namespace.get(self.key)
        if is_instance(value) and type(value).__module__ != self.module:
            return "make it inside the function that the ranks run"
        return _rank_local(self.module)


class WatchedCache:
    """A function with ``functools.lru_cache`` whose results depend on who calls it."""

    def __init__(self, module: str, name: str, cached: Any, reads: str) -> None:
        self.module = module
        self.label = f"{module}.{name}"
        self.contents = Contents()
        self.namespace: Mapping[str, Any] = {}
        self.key = ""
        self.writers: list[int] = []
        self._reads = reads
        self.info = cached.cache_info
        self._hits = self.info().hits
        self.reset()

    def reset(self) -> None:
        """Take what there is now for unchanged."""
        self.last = self.info()

    def changed(self) -> bool:
        """Whether somebody has called it since."""
        return bool(self.info() != self.last)

    def matters(self) -> bool:
        """Whether any result was given out a second time."""
        return bool(self.info().hits > self._hits)

    def warning(self) -> str:
        """What to tell when two ranks have called it."""
        first, second = sorted(self.writers)
        return (
            f"{self.label} caches its results for all simulated ranks, and ranks {first} and {second} called it, "
            f"though it depends on {self._reads}; on a cluster each rank has a cache of its own. If that matters, "
            f"{_rank_local(self.module)}"
        )


def _rank_local(module: str) -> str:
    return f"run with SimWorld(rank_local=[{module!r}]) or --rank-local {module}"
