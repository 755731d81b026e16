"""Sees modules being imported during a run.

A module is executed once, by the rank that imports it first. In real processes every rank executes it, so what its code
does to the process (the environment, warning filters, globals of libraries) is done for every rank.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from lightrft.sim.current import current_task

__all__ = ["ImportWatcher"]


class ImportWatcher(importlib.abc.MetaPathFinder):
    """Brackets every import that a rank does; the imports inside it count as part of it.

    Args:
        before: called before the module is executed.
        after: called with what ``before`` returned, once the module has been executed without an error.
    """

    def __init__(self, before: Callable[[], Any], after: Callable[[Any], None]) -> None:
        self._before = before
        self._after = after
        self._finding: set[str] = set()
        self._importing: set[int] = set()

    def begin(self) -> None:
        """Watch from now on."""
        sys.meta_path.insert(0, self)

    def end(self) -> None:
        """Watch no longer."""
        sys.meta_path.remove(self)

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the interface of finders
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the module by the finders that follow, and have its execution bracketed."""
        task = current_task()
        if task is None or id(task) in self._importing or fullname in self._finding:
            return None
        self._finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def execute(self, run: Callable[[], None]) -> None:
        """Execute a module."""
        task = id(current_task())
        if task in self._importing:
            run()
            return
        self._importing.add(task)
        try:
            before = self._before()
            run()
            self._after(before)
        finally:
            self._importing.discard(task)


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, watcher: ImportWatcher) -> None:
        self._inner = inner
        self._watcher = watcher

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # runpy asks the loader for the code

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._watcher.execute(lambda: self._inner.exec_module(module))
