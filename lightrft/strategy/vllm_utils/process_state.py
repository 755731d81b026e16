"""What an engine changes in the process that it shares with the trainer."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from lightrft.strategy.utils.random_state import capture_random_state, restore_random_state

__all__ = ["ProcessState", "keeping_the_default_group"]


class ProcessState:
    """The state of the process as the engine wants it, kept apart from the trainer's.

    Inside ``entered`` the process is as the engine has left it; outside nothing of that is seen. An engine that runs in
    the process sets environment variables, seeds the generators of torch, Python and NumPy and draws from them,
    disables ``torch.set_num_threads``, fixes the start method of ``multiprocessing``, freezes the garbage collector,
    and makes a default process group if there is none.

    Environment variables, ``torch.set_num_threads`` and the default group are the engine's again in every call of it;
    the rest is only given back, and the garbage collector is not frozen at all.

    Args:
        environ: variables that the engine needs.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = dict(environ)
        self._set_num_threads: Any = None
        self._group: dist.ProcessGroup | None = None

    @contextmanager
    def entered(self, *, starts: bool = False) -> Iterator[None]:
        """Be in the engine's process for a while.

        Args:
            starts: whether the engine is started inside, which is when it would freeze the garbage collector.
        """
        outside = _Outside()
        os.environ.update(self._environ)
        if self._set_num_threads is not None:
            torch.set_num_threads = self._set_num_threads
        if self._group is not None:
            _set_default_group(self._group)
        try:
            with _nothing_freezes() if starts else nullcontext():
                yield
        finally:
            self._environ |= outside.changed_environ()
            self._set_num_threads = outside.other_than("set_num_threads", torch.set_num_threads)
            self._group = outside.other_than("group", _default_group())
            outside.restore()


def _default_group() -> dist.ProcessGroup | None:
    return dist.GroupMember.WORLD if dist.is_available() else None


def _set_default_group(group: dist.ProcessGroup | None) -> None:
    dist.GroupMember.WORLD = group


@dataclass
class _Outside:
    """The state of the trainer's process."""

    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    random_state: dict[str, Any] = field(default_factory=capture_random_state)
    set_num_threads: Any = field(default_factory=lambda: torch.set_num_threads)
    threads: int = field(default_factory=torch.get_num_threads)
    group: dist.ProcessGroup | None = field(default_factory=_default_group)
    start_method: str | None = field(default_factory=lambda: multiprocessing.get_start_method(allow_none=True))
    excepthook: Any = field(default_factory=lambda: sys.excepthook)

    def changed_environ(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if self.environ.get(name) != value}

    def other_than(self, name: str, found: Any) -> Any:
        """``found``, unless it is what was there before."""
        return None if found is getattr(self, name) else found

    def restore(self) -> None:
        for name in set(os.environ) - set(self.environ):
            del os.environ[name]
        os.environ.update({name: value for name, value in self.environ.items() if os.environ.get(name) != value})
        restore_random_state(self.random_state)
        if torch.set_num_threads is not self.set_num_threads:
            torch.set_num_threads = self.set_num_threads
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
        if _default_group() is not self.group:
            _set_default_group(self.group)
        if multiprocessing.get_start_method(allow_none=True) != self.start_method:
            multiprocessing.set_start_method(self.start_method, force=True)
        if sys.excepthook is not self.excepthook:
            sys.excepthook = self.excepthook


_freeze: Any = gc.freeze


@contextmanager
def _nothing_freezes() -> Iterator[None]:
    """Freezing does nothing: garbage of the trainer that was frozen would never be collected."""
    gc.freeze = lambda: None
    try:
        yield
    finally:
        gc.freeze = _freeze


@contextmanager
def keeping_the_default_group() -> Iterator[None]:
    """Let nobody on this thread destroy the default process group: an engine that ends takes it for its own."""
    destroy = dist.destroy_process_group
    thread = threading.get_ident()

    def destroy_others(group: dist.ProcessGroup | None = None) -> None:
        if threading.get_ident() != thread or (group is not None and group is not _default_group()):
            destroy(group)

    dist.destroy_process_group = destroy_others
    try:
        yield
    finally:
        dist.destroy_process_group = destroy
