"""What a process owns, saved and restored whenever the baton passes from one rank to another.

Three kinds of state are told apart by what a switch costs. Plain attributes are swapped always (a few tens of
nanoseconds each). Flags that live in C++ are read always and written only where two ranks differ. The generators of
Python and NumPy are read in full only after somebody has drawn from them: a look at the head of their memory tells.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import distributed_c10d as c10d
from torch.utils import _device

from lightrft.sim.current import current_task
from lightrft.sim.frozen import freeze_imports
from lightrft.sim.imports import ImportWatcher
from lightrft.sim.library_state import LibraryState
from lightrft.sim.loggers import RankLoggers
from lightrft.sim.random_state import fresh_states, generators
from lightrft.sim.rank_local import RankLocalModules

if TYPE_CHECKING:
    from lightrft.sim.places import Place

__all__ = ["ProcessState", "StateSwitcher"]


class GroupTables:
    """The tables of ``torch.distributed`` for one rank; takes the place of ``distributed_c10d._world``."""

    def __init__(self) -> None:
        self.default_pg: Any = None
        self.pg_map: dict[Any, Any] = {}
        self.pg_names: dict[Any, Any] = {}
        self.pg_group_ranks: dict[Any, Any] = {}
        self.pg_backend_config: dict[Any, Any] = {}
        self.group_count = 0
        self.tags_to_pg: dict[str, list[Any]] = {}
        self.pg_to_tag: dict[Any, str] = {}
        self.pg_coalesce_state: dict[Any, list[Any]] = {}
        self.comms: list[Any] = []

    @property
    def pg_config_info(self) -> list[dict[str, Any]]:
        """One dict per group: name, description, backends, ranks, size, as the original offers it."""
        everyone = self.default_pg.size() if self.default_pg is not None else 0
        return [
            {
                "pg_name": self.pg_names[pg],
                "pg_desc": pg.group_desc,
                "backend_config": self.pg_backend_config[pg],
                "ranks": [] if len(self.pg_group_ranks[pg]) == everyone else list(self.pg_group_ranks[pg]),
                "group_size": len(self.pg_group_ranks[pg]),
                "group_count": self.group_count,
            }
            for pg in self.pg_map
        ]


# -- flags kept in C++ ------------------------------------------------------------------------------------------------


def _set_deterministic(value: tuple[bool, bool]) -> None:
    torch._C._set_deterministic_algorithms(value[0], warn_only=value[1])


def _get_deterministic() -> tuple[bool, bool]:
    return (
        torch._C._get_deterministic_algorithms(),
        torch._C._get_deterministic_algorithms_warn_only(),
    )


_FLAGS: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
    (torch.get_default_dtype, torch._C._set_default_dtype),
    (_get_deterministic, _set_deterministic),
    (torch._C._get_deterministic_fill_uninitialized_memory, torch._C._set_deterministic_fill_uninitialized_memory),
    (torch._C._get_cudnn_deterministic, torch._C._set_cudnn_deterministic),
    (torch._C._get_cudnn_benchmark, torch._C._set_cudnn_benchmark),
    (torch._C._get_float32_matmul_precision, torch._C._set_float32_matmul_precision),
]


def _read_flags() -> tuple[Any, ...]:
    return tuple([get() for get, _ in _FLAGS])


def _write_flags(current: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    for (_, put), old, new in zip(_FLAGS, current, wanted, strict=True):
        if old != new:
            put(new)


# -- one rank's state -------------------------------------------------------------------------------------------------


class ProcessState:
    """The process-global state of one rank, while that rank does not run."""

    __slots__ = (
        "argv",
        "atexit",
        "backend",
        "cwd",
        "default_device",
        "environ",
        "excepthook",
        "flags",
        "generators",
        "groups",
        "init_method",
        "libraries",
        "log_disable",
        "loggers",
        "main",
        "modules",
        "path",
        "signals",
        "stderr",
        "stdout",
        "warning_default",
        "warning_filters",
        "warning_once",
        "warning_show",
        "warning_show_impl",
    )

    def __init__(self, environ: dict[bytes, bytes]) -> None:
        self.groups = GroupTables()
        self.backend: str | None = None
        self.init_method: str | None = None
        self.environ = environ
        self.argv = list(sys.argv)
        self.path = list(sys.path)
        self.main = sys.modules["__main__"]
        self.stdout = sys.stdout
        self.stderr = sys.stderr
        self.excepthook = sys.excepthook
        self.cwd: str | None = None
        self.default_device = _device.CURRENT_DEVICE
        self.flags = _read_flags()
        self.generators: list[Any] = []
        self.warning_filters: Any = list(warnings.filters)
        self.warning_show = warnings.showwarning
        self.warning_show_impl = warnings._showwarnmsg_impl  # type: ignore[attr-defined]
        self.warning_once = dict(warnings.onceregistry)  # type: ignore[attr-defined]
        self.warning_default = warnings.defaultaction  # type: ignore[attr-defined]
        self.modules: Any = None
        self.libraries: Any = None
        self.loggers: list[dict[str, Any]] = []
        self.log_disable = logging.root.manager.disable
        self.signals: dict[int, Any] = {}
        self.atexit: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Place]] = []


_MANY_MODULES = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class _Effects:
    """What executing a module may change in the process, as it is at one moment."""

    environ: dict[bytes, bytes]
    path: list[str]
    filters: list[Any]
    flags: tuple[Any, ...]
    modules: int

    def spread(self, after: _Effects, state: ProcessState) -> None:
        """Change for ``state`` what differs between this moment and ``after``; what the rank set itself it keeps."""
        for key, value in after.environ.items():
            if self.environ.get(key) != value and state.environ.get(key) == self.environ.get(key):
                state.environ[key] = value
        state.path[:0] = [entry for entry in after.path if entry not in self.path and entry not in state.path]
        added = [each for each in after.filters if each not in self.filters and each not in state.warning_filters]
        if added:
            state.warning_filters = [*added, *state.warning_filters]
        flags = zip(state.flags, self.flags, after.flags, strict=True)
        state.flags = tuple(new if mine == old else mine for mine, old, new in flags)


class StateSwitcher:
    """Loads the state of one rank after saving that of another; puts the process's own state back at the end.

    Args:
        rank_local: names of modules (and packages, with all below) whose globals each rank has for itself.
    """

    def __init__(self, rank_local: list[str]) -> None:
        self._os_environ: Any = os.environ
        self._os_environb: Any = getattr(os, "environb", None)
        self._generators = generators()
        self._flags = _read_flags()
        self.modules = RankLocalModules(rank_local)
        self.libraries = LibraryState()
        self._states: list[ProcessState] = []
        self.loggers = RankLoggers()
        self.any_chdir = False
        self._cwd = os.getcwd()
        self._environs: list[dict[bytes, bytes]] = []

    @contextmanager
    def around_run(self) -> Iterator[None]:
        """Remember the process's own state now, and restore it on leaving."""
        original = ProcessState(self._os_environ._data)
        original.groups = c10d._world  # type: ignore[assignment]
        original.backend, original.init_method = c10d._backend, c10d._default_pg_init_method
        original.argv, original.path = sys.argv, sys.path
        original.loggers = self.loggers.originals
        original.warning_filters, original.warning_once = warnings.filters, warnings.onceregistry  # type: ignore[attr-defined]
        original.cwd = self._cwd
        environ = dict(self._os_environ._data)
        path, argv, filters = list(sys.path), list(sys.argv), list(warnings.filters)
        original.generators = [generator.begin() for generator in self._generators]
        self.libraries.begin()
        imports = ImportWatcher(self._before_import, self._after_import)
        imports.begin()
        self.modules.begin()
        original.modules = self.modules.pristine()
        original.libraries = self.libraries.new_state()
        isolation = torch._C._distributed_c10d._set_thread_isolation_mode  # type: ignore[attr-defined]
        isolation(True)
        try:
            yield
        finally:
            isolation(False)
            for generator in self._generators:
                generator.loaded = None
            self._flags = _read_flags()
            self.load(original)
            _restore_c_environ(environ, self._environs)
            sys.path[:], sys.argv[:] = path, argv
            if list(warnings.filters) != filters:
                warnings.filters[:] = filters  # type: ignore[index]
                warnings._filters_mutated()  # type: ignore[attr-defined]
            if os.getcwd() != self._cwd:
                os.chdir(self._cwd)
            self.modules.end()
            imports.end()
            self.libraries.end()

    def new_state(self, environ: dict[str, str], seed: int) -> ProcessState:
        """The state of a process that has just started, with ``environ`` added to the environment.

        The generators of torch, Python and NumPy, which a real process seeds from the operating system, are seeded from
        ``seed``.
        """
        data = dict(self._os_environ._data)
        encode_key, encode_value = self._os_environ.encodekey, self._os_environ.encodevalue
        for key, value in environ.items():
            data[encode_key(key)] = encode_value(value)
        state = ProcessState(data)
        self._environs.append(data)
        state.generators = fresh_states(seed)
        state.modules = self.modules.pristine()
        state.libraries = self.libraries.new_state()
        self._states.append(state)
        return state

    def _before_import(self) -> tuple[_Effects, list[Any]]:
        return self._effects(), self.libraries.read()

    def _effects(self) -> _Effects:
        return _Effects(
            environ=dict(self._os_environ._data),
            path=list(sys.path),
            filters=list(warnings.filters),
            flags=_read_flags(),
            modules=len(sys.modules),
        )

    def _after_import(self, found: tuple[_Effects, list[Any]]) -> None:
        """What executing a module did to one rank's process it does to all."""
        (before, libraries), after = found, self._effects()
        task = current_task()
        assert task is not None
        mine = task.rank.state
        self.libraries.spread(libraries, mine.libraries)
        if after.modules > before.modules + _MANY_MODULES:
            freeze_imports()
        for state in self._states:
            if state is not mine:
                before.spread(after, state)

    def is_local(self, module: str) -> bool:
        """Whether every rank has its own globals of the module of this name, or of those that need it."""
        return self.modules.matches(module) or self.libraries.matches(module)

    def save(self, state: ProcessState) -> None:
        """Take the running rank's state out of the process."""
        state.groups = c10d._world  # type: ignore[assignment]
        state.backend = c10d._backend
        state.init_method = c10d._default_pg_init_method
        state.argv = sys.argv
        state.path = sys.path
        state.stdout = sys.stdout
        state.stderr = sys.stderr
        state.excepthook = sys.excepthook
        state.default_device = _device.CURRENT_DEVICE
        state.flags = self._flags = _read_flags()
        state.log_disable = logging.root.manager.disable
        state.warning_filters = warnings.filters
        state.warning_show = warnings.showwarning
        state.warning_show_impl = warnings._showwarnmsg_impl  # type: ignore[attr-defined]
        state.warning_once = warnings.onceregistry  # type: ignore[attr-defined]
        state.warning_default = warnings.defaultaction  # type: ignore[attr-defined]
        for generator in self._generators:
            generator.save(state.generators)
        self.libraries.save(state.libraries)
        if self.modules.active:
            self.modules.save(state.modules)

    def load(self, state: ProcessState) -> None:
        """Put a rank's state into the process."""
        c10d._world = state.groups  # type: ignore[assignment]
        c10d._backend = state.backend
        c10d._default_pg_init_method = state.init_method
        self._os_environ._data = state.environ
        if self._os_environb is not None:
            self._os_environb._data = state.environ
        sys.argv = state.argv
        sys.path = state.path
        sys.stdout = state.stdout
        sys.stderr = state.stderr
        sys.excepthook = state.excepthook
        _device.CURRENT_DEVICE = state.default_device
        sys.modules["__main__"] = state.main
        if self._flags != state.flags:
            _write_flags(self._flags, state.flags)
            self._flags = state.flags
        if warnings.filters != state.warning_filters:
            warnings.filters = state.warning_filters
            warnings._filters_mutated()  # type: ignore[attr-defined]
        else:
            warnings.filters = state.warning_filters
        self.loggers.load(state.loggers)
        manager = logging.root.manager
        if manager.disable != state.log_disable:
            manager.disable = state.log_disable
        warnings.showwarning = state.warning_show
        warnings._showwarnmsg_impl = state.warning_show_impl  # type: ignore[attr-defined]
        warnings.onceregistry = state.warning_once  # type: ignore[attr-defined]
        warnings.defaultaction = state.warning_default  # type: ignore[attr-defined]
        for generator in self._generators:
            generator.load(state.generators)
        if self.any_chdir:
            wanted = state.cwd or self._cwd
            if wanted != _real_getcwd():
                _real_chdir(wanted)
        self.libraries.load(state.libraries)
        if self.modules.active:
            self.modules.load(state.modules)


_real_chdir = os.chdir
_real_getcwd = os.getcwd


def _restore_c_environ(environ: dict[bytes, bytes], others: list[dict[bytes, bytes]]) -> None:
    """Give the environment of C, to which ranks wrote through ``os.environ``, its values back."""
    for other in others:
        for key in other.keys() - environ.keys():
            os.unsetenv(key)
    for key, value in environ.items():
        if any(other.get(key) != value for other in others):
            os.putenv(key, value)
