"""Sees modules being imported during a run.

A module is executed once, by the rank that imports it first. In real processes every rank executes it, so what its code
does to the process (the environment, warning filters, globals of libraries) is done for every rank.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from lightrft.sim.current import current_task

__all__ = ["ExecutionHook", "ImportWatcher"]


class ExecutionHook(importlib.abc.MetaPathFinder):
    """A finder that leaves finding to those that follow, and stands in when a rank executes a module."""

    def __init__(self) -> None:
        self._finding: set[str] = set()

    @abstractmethod
    def wants(self, name: str) -> bool:
        """Whether to stand in for the module of this name."""

    @abstractmethod
    def execute(self, module: ModuleType, run: Callable[[], None]) -> None:
        """Execute ``module`` by calling ``run``, with whatever is to be done before and after."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the interface of finders
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Find the module by the finders that follow, with a loader that calls :meth:`execute`."""
        if current_task() is None or fullname in self._finding or not self.wants(fullname):
            return None
        self._finding.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._finding.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, inner: Any, hook: ExecutionHook) -> None:
        self._inner = inner
        self._hook = hook

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._inner.create_module(spec)
        return module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # runpy asks the loader for the code

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._inner
        if module.__spec__ is not None:
            module.__spec__.loader = self._inner
        self._hook.execute(module, lambda: self._inner.exec_module(module))


class ImportWatcher(ExecutionHook):
    """Brackets every import that a rank does; the imports inside it count as part of it.

    Args:
        before: called before the module is executed.
        after: called with what ``before`` returned, once the module has been executed without an error.
    """

    def __init__(self, before: Callable[[], Any], after: Callable[[Any], None]) -> None:
        super().__init__()
        self._before = before
        self._after = after
        self._importing: set[int] = set()

    def begin(self) -> None:
        """Watch from now on."""
        sys.meta_path.insert(0, self)

    def end(self) -> None:
        """Watch no longer."""
        sys.meta_path.remove(self)

    def wants(self, name: str) -> bool:  # noqa: ARG002 - any module
        """Every module, unless it is imported by one that is being executed."""
        return id(current_task()) not in self._importing

    def execute(self, module: ModuleType, run: Callable[[], None]) -> None:  # noqa: ARG002 - whichever it is
        """Execute a module, and tell what it was like before and after."""
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
