"""One rank of a process world: what it does between its fork and its end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import itertools
import logging
import os
import pickle
import random
import select
import signal
import socket
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import util
from typing import Any

import numpy as np
import torch

from lightrft.sim.environ import rank_seed, torchrun_environ
from lightrft.sim.places import is_user_file
from lightrft.sim.process_errors import PackedError, pack_error
from lightrft.sim.process_pickle import dumps
from lightrft.sim.process_rendezvous import watch_for_the_store
from lightrft.sim.process_shared import map_file, write

__all__ = ["EXIT", "GO", "RAISED", "READY", "RETURNED", "STACKS", "Outcome", "Settings", "run_rank"]

READY, RETURNED, RAISED = b"r", b"v", b"e"
"""What a rank tells: it has loaded the function; the function has returned, or raised."""

GO, EXIT = b"g", b"x"
"""What a rank is told: all are ready; all have returned."""

STACKS = signal.SIGRTMAX - 3
"""The signal at which a rank writes its stacks; programs have no use for it."""

_GRACE = 1.0
"""Seconds for which a rank that has returned waits for the others, so that their last words to it find it alive."""

_BRIEF_LOOKUPS = {"RES_OPTIONS": "timeout:1 attempts:1"}
"""Torch asks the resolver for the name of 127.0.0.1, and one that does not answer is asked for 5 seconds and more."""

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a rank is given before the function is loaded.

    Attributes:
        size: number of ranks.
        gpus_per_node: ranks on a node.
        seed: seeds, with the rank, the generators of Python, NumPy and torch.
        port: ``MASTER_PORT``.
        environ: environment of the process that runs the world.
        directory: its working directory.
        path: its ``sys.path``.
        arguments: its ``sys.argv``.
    """

    size: int
    gpus_per_node: int
    seed: int
    port: int
    environ: dict[str, str]
    directory: str
    path: list[str]
    arguments: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a rank.

    Attributes:
        result: what the function returned, pickled; None if it raised.
        error: what it raised.
        modules: modules that the rank loaded and that are not the user's own, in the order in which it did.
    """

    result: bytes | None
    error: PackedError | None
    modules: list[str]


def run_rank(rank: int, parent: int, *descriptors: int) -> None:
    """Be rank ``rank`` until its end; does not return.

    Args:
        rank: global rank.
        parent: process that forked this one.
        descriptors: socket to the process that runs the world, standard output, standard error, the file for the
            outcome, the file for stacks, and the file with the pickled :class:`Settings` and function.
    """
    channel, output, errors, outcome, stacks, body = descriptors
    code = 1
    try:
        _die_with(parent)
        _take_streams(output, errors)
        _write_stacks_to(stacks)
        with socket.socket(fileno=channel) as notes:
            code = _run(rank, notes, outcome, body)
    except BaseException:  # noqa: BLE001 - our own mistake, or an exit function of the user; both end in this process
        traceback.print_exc()
    finally:
        os._exit(code)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _take_streams(output: int, errors: int) -> None:
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(output, 1)
    os.dup2(errors, 2)
    os.close(output)
    os.close(errors)


def _write_stacks_to(stacks: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable(stacks)
    faulthandler.register(STACKS, stacks)


def _run(rank: int, channel: socket.socket, outcome: int, body: int) -> int:
    """Load the function, run it, and tell what came of it; gives the exit status."""
    newest = next(reversed(sys.modules))
    _forget_exit_functions()
    watch_for_the_store()
    try:
        function = _load(rank, body)
        channel.send(READY)
        _wait(channel, GO)
        note, result = RETURNED, _pickle_result(rank, _call(function))
        error = None
    except BaseException as raised:  # noqa: BLE001 - a rank may raise anything; the run reports it
        note, result, error = RAISED, None, pack_error(raised)
    write(outcome, pickle.dumps(Outcome(result=result, error=error, modules=_libraries_since(newest))))
    _flush()
    channel.send(note)
    if note == RAISED:
        _wait(channel, EXIT)  # the others are looked at, then all are killed
    _wait(channel, EXIT, _GRACE)
    _leave()
    return 0


def _load(rank: int, body: int) -> Callable[[], Any]:
    with map_file(body) as file:
        settings: Settings = pickle.load(file)
        os.environ.clear()
        os.environ.update(_BRIEF_LOOKUPS | settings.environ | rank_environ(settings, rank))
        sys.path[:] = settings.path
        sys.argv[:] = settings.arguments
        os.chdir(settings.directory)
        torch.set_num_threads(_threads())
        function: Callable[[], Any]
        filters, function = pickle.load(file)
    warnings.resetwarnings()
    warnings.filters.extend(filters)  # type: ignore[attr-defined]
    seed = rank_seed(settings.seed, rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what a program draws from is seeded
    torch.manual_seed(seed)
    return function


def rank_environ(settings: Settings, rank: int) -> dict[str, str]:
    """The variables that torchrun would set."""
    return torchrun_environ(
        rank,
        settings.size,
        gpus_per_node=settings.gpus_per_node,
        port=settings.port,
        threads=settings.environ.get("OMP_NUM_THREADS", "1"),
    )


def _threads() -> int:
    value = os.environ["OMP_NUM_THREADS"]
    return int(value) if value.isdigit() and int(value) > 0 else 1


def _call(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
        return None


def _pickle_result(rank: int, result: Any) -> bytes:
    try:
        return dumps(result)
    except Exception as error:
        kind = f"{type(result).__module__}.{type(result).__qualname__}"
        problem = f"rank {rank} returned a {kind}, which cannot be pickled: {error}. Return tensors or plain data."
        raise TypeError(problem) from error


def _libraries_since(newest: str) -> list[str]:
    """Libraries loaded after the module ``newest``, in that order.

    Older modules are not looked at: to count a reference to each would copy thousands of pages of memory. The list is
    made in one go: a thread that the rank has left may still import.
    """
    names = list(itertools.takewhile(newest.__ne__, reversed(sys.modules)))
    return [name for name in reversed(names) if _is_library(sys.modules.get(name))]


def _is_library(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and not is_user_file(file) and getattr(module, "__spec__", None) is not None


def _wait(channel: socket.socket, expected: bytes, seconds: float | None = None) -> None:
    """Wait until told ``expected``, or for so many seconds."""
    if select.select([channel], [], [], seconds)[0] and channel.recv(1) != expected:
        os._exit(1)


def _forget_exit_functions() -> None:
    """What was registered before the fork belongs to the process that registered it."""
    atexit._clear()
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False
    atexit.register(weakref.finalize._exitfunc)  # type: ignore[attr-defined]
    atexit.register(logging.shutdown)
    util._finalizer_registry.clear()  # type: ignore[attr-defined]
    atexit.register(util._exit_function)  # type: ignore[attr-defined]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.flush()


def _leave() -> None:
    """What the interpreter does at its end: join threads, run exit functions, write what is buffered."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush()
