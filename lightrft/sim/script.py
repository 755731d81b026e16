"""A script or module that every rank runs as its own ``__main__``, as ``python script.py`` or ``python -m`` would."""

from __future__ import annotations

import argparse
import builtins
import importlib.machinery
import importlib.util
import io
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

from lightrft.sim.current import current_task

__all__ = ["Script"]


class Script:
    """A program and its arguments.

    Args:
        name: file name of a script, or, with ``as_module``, the name of a module or package.
        arguments: what follows it on the command line.
        as_module: run it as ``python -m`` does.
        drop_launcher: leave out the first entry of ``sys.path``, which belongs to the program that Python was started
            with; the entry of the script takes its place.

    Attributes:
        told: the exit status with which ``argparse`` ended the first rank, after help or a complaint, before another
            had begun. The others do not begin then: they would say the same.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], *, as_module: bool = False, drop_launcher: bool = False
    ) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.as_module = as_module
        self.drop_launcher = drop_launcher
        self._file = os.path.abspath(name)
        self._spec: ModuleSpec | None = None
        self._code: CodeType | None = None
        self._begun = 0
        self.told: int | None = None

    def problem(self) -> str:
        """Why this cannot be run, in one line; empty if nothing is seen without running any of it."""
        if self.as_module:
            return self._module_problem()
        if os.path.isdir(self._file):
            return f"{self.name!r} is a folder: expected a Python file"
        if not os.path.exists(self._file):
            hint = "; to run a module, write -m before its name" if not self.name.endswith(".py") else ""
            return f"there is no file {self.name!r}{hint}"
        if not os.access(self._file, os.R_OK):
            return f"{self.name!r} cannot be read"
        return ""

    def _module_problem(self) -> str:
        if self.name.endswith(".py"):
            return f"-m takes the name of a module, and {self.name!r} is that of a file: leave out -m"
        if not all(part.isidentifier() for part in self.name.split(".")):
            return f"-m takes the name of a module, such as package.module: {self.name!r} is none"
        return self.missing_module(self.name)

    def missing_module(self, name: str) -> str:
        """Why the program cannot import ``name``, as far as that is seen without importing anything; else empty."""
        top = name.partition(".")[0]
        with self.installed():
            if top in sys.modules or importlib.util.find_spec(top) is not None:
                return ""
            return f"there is no module {top!r} in {sys.path[0]} or among the installed packages"

    def compile(self) -> None:
        """Compile a script once for all ranks. A module is found by the first rank that runs.

        Raises:
            SyntaxError, ValueError: the file is no Python source.
        """
        if not self.as_module:
            with io.open_code(self._file) as file:
                self._code = compile(file.read(), self._file, "exec", dont_inherit=True)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have ``sys.argv`` and ``sys.path`` of the program in this process, from where every rank takes its copy."""
        argv, path = sys.argv, sys.path
        rest = list(path)
        if not sys.flags.safe_path:
            first = os.getcwd() if self.as_module else os.path.dirname(os.path.realpath(self._file))
            rest[: 1 if self.drop_launcher else 0] = [first]
        sys.argv = ["-m" if self.as_module else self.name, *self.arguments]
        sys.path = rest
        try:
            yield
        finally:
            sys.argv, sys.path = argv, path

    def run(self) -> None:
        """Run the program as ``__main__`` of the calling rank; returns where a process would end with status 0."""
        if self.told is not None:
            return
        self._begun += 1
        task = current_task()
        assert task is not None
        if self.as_module and self._code is None:
            self._spec, self._code = _find_module(self.name)
        assert self._code is not None
        main = self._new_main()
        task.rank.state.main = sys.modules["__main__"] = main
        if self._spec is not None:
            sys.argv[0] = main.__file__ or ""
        try:
            exec(self._code, vars(main))
        except SystemExit as end:
            if self._begun == 1 and _ends_in_argparse(end):
                self.told = int(end.code or 0)
                return
            if end.code not in (None, 0):
                raise

    def _new_main(self) -> ModuleType:
        main = ModuleType("__main__")
        spec = self._spec
        values: dict[str, Any] = {"__builtins__": builtins, "__annotations__": {}, "__cached__": None}
        if spec is None:
            loader: Any = importlib.machinery.SourceFileLoader("__main__", self._file)
            values |= {"__file__": self._file, "__loader__": loader, "__package__": None, "__spec__": None}
        else:
            values |= {"__file__": spec.origin, "__loader__": spec.loader, "__package__": spec.parent, "__spec__": spec}
            values["__cached__"] = spec.cached
        vars(main).update(values)
        return main


def _ends_in_argparse(end: SystemExit) -> bool:
    """Whether a parser of command lines has ended the program, and not the program itself."""
    frames = [frame for frame, _ in traceback.walk_tb(end.__traceback__)]
    return frames[-1].f_code.co_filename == argparse.__file__ and end.code in (None, 0, 2)


def _find_module(name: str) -> tuple[ModuleSpec, CodeType]:
    """Spec and code of what ``python -m name`` runs. Imports the packages around it."""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations is not None:
        name = f"{name}.__main__"
        spec = importlib.util.find_spec(name)
    get_code = getattr(spec.loader, "get_code", None) if spec is not None else None
    code = get_code(name) if get_code is not None else None
    if spec is None or code is None:
        raise ImportError(f"no module named {name!r} that Python can run", name=name)
    return spec, code
