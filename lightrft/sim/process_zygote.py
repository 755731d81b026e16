"""The process that starts ranks: it has loaded torch, and every rank is a fork of it.

It has one thread, runs no operation of torch and never initialises CUDA, so that a fork starts as a fresh process does.
Commands come as JSON over a socket from the process that runs worlds, file descriptors travel beside them:

- ``fork``: start a rank, see :func:`lightrft.sim.process_rank.run_rank`;
- ``stacks``: have every rank write its Python stacks to its file;
- ``end``: kill all ranks and what they started, answered by ``ended``;
- ``import``: load the packages that ranks had to load, so that the next ranks find them.

Unasked it tells who ``died``, and which package has ``spoiled`` it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import itertools
import json
import os
import pickle
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed

from lightrft.sim.process_pool import FORK_SAFE
from lightrft.sim.process_rank import STACKS, run_rank
from lightrft.sim.process_shared import map_file

__all__ = ["main"]

_MOST_BYTES = 1 << 16
_MOST_DESCRIPTORS = 16
_PR_SET_CHILD_SUBREAPER = 36
_LOOK = 1.0
"""Seconds after which it is looked whether the parent still lives, in case others hold the parent's socket."""


def main(descriptor: int) -> None:
    """Serve the process at the other end of the socket ``descriptor`` until it closes the socket or dies."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what a dead rank had started becomes a child of ours
    for number in (signal.SIGINT, STACKS):  # ranks that have just been forked are not yet ready for them
        signal.signal(number, signal.SIG_IGN)
    _make_streams()
    try:
        Zygote(socket.socket(fileno=descriptor)).serve()
    finally:
        end_children()


def _make_streams() -> None:
    """Give this process streams that later write to pipes: libraries keep them when they are loaded."""
    pipe = os.pipe()
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        saved = os.dup(descriptor)
        os.dup2(pipe[1], descriptor)
        raw = io.FileIO(descriptor, "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
        )
        os.dup2(saved, descriptor)
        os.close(saved)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.close(pipe[0])
    os.close(pipe[1])


class Zygote:
    """Takes commands and looks after the ranks."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._parent = os.getppid()
        self._ranks: dict[int, int] = {}
        self._alarm, self._bell = os.pipe()
        os.set_blocking(self._alarm, False)
        os.set_blocking(self._bell, False)

    def serve(self) -> None:
        """Serve until the parent has gone."""
        self._listen_for_children()
        while os.getppid() == self._parent:
            ready = select.select([self._control.fileno(), self._alarm], [], [], _LOOK)[0]
            if self._alarm in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._alarm, _MOST_BYTES)
            self._bury()
            if self._control.fileno() in ready and not self._take_command():
                return

    def _listen_for_children(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._bell, warn_on_full_buffer=False)

    def _take_command(self) -> bool:
        try:
            message, descriptors, _, _ = socket.recv_fds(self._control, _MOST_BYTES, _MOST_DESCRIPTORS)
        except ConnectionError:
            return False
        if not message:
            return False
        command = json.loads(message)
        match command["do"]:
            case "fork":
                self._fork(command["rank"], descriptors)
            case "stacks":
                for pid in self._ranks:
                    os.kill(pid, STACKS)
            case "end":
                end_children()
                self._ranks.clear()
                self._tell(event="ended", number=command["number"])
            case "import":
                self._import(descriptors[0])
        for descriptor in descriptors:
            os.close(descriptor)
        return True

    def _tell(self, **event: Any) -> None:
        with contextlib.suppress(ConnectionError):
            self._control.send(json.dumps(event).encode())

    def _fork(self, rank: int, descriptors: Sequence[int]) -> None:
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            self._control.close()
            os.close(self._alarm)
            os.close(self._bell)
            run_rank(rank, me, *descriptors)
        self._ranks[pid] = rank

    def _bury(self) -> None:
        """Tell of every rank that has died."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid in self._ranks:
                self._tell(event="died", rank=self._ranks.pop(pid), code=os.waitstatus_to_exitcode(status))

    def _import(self, descriptor: int) -> None:
        """Load modules as ranks loaded them; stop at the first package that makes this process unfit to fork."""
        with map_file(descriptor) as file:
            wanted = pickle.load(file)
        os.environ.clear()
        os.environ.update(wanted["environ"] | FORK_SAFE)
        sys.path[:] = wanted["path"]
        for package, names in itertools.groupby(wanted["modules"], key=lambda name: name.partition(".")[0]):
            try:
                for name in names:
                    with contextlib.suppress(ModuleNotFoundError):  # names that only stand in sys.modules
                        importlib.import_module(name)
            except BaseException:  # noqa: BLE001 - a package may fail in any way where it is loaded without a rank
                self._tell(event="spoiled", package=package)
                return
            if not _is_clean():
                self._tell(event="spoiled", package=package)
                return
        self._listen_for_children()
        gc.collect()
        gc.freeze()


def _is_clean() -> bool:
    """Whether a fork of this process starts as a fresh process does."""
    if len(os.listdir("/proc/self/task")) > 1:
        return False
    if not hasattr(torch._C, "_cuda_isInBadFork"):
        return True
    pid = os.fork()
    if pid == 0:
        os._exit(torch._C._cuda_isInBadFork())
    return os.waitpid(pid, 0)[1] == 0


def end_children() -> None:
    """Kill all children, and the children of those, which become ours when their parents die."""
    with contextlib.suppress(ChildProcessError):
        while True:
            for pid in _children():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.001)


def _children() -> list[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        return [int(pid) for pid in file.read().split()]
