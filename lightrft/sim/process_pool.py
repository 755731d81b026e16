"""The warm process of which the ranks of all process worlds are forks."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from lightrft.errors import SimulationError
from lightrft.sim.process_shared import memory_file, read_text

if TYPE_CHECKING:
    from lightrft.sim.process_rank import Outcome

__all__ = ["Pool", "shared"]

_START = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[2]); "
    "from lightrft.sim.process_zygote import main; main(int(sys.argv[1]))"
)


_PATIENCE = 120.0
"""Seconds within which the process must answer; loading libraries is the longest that it does."""

FORK_SAFE = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Keeps libraries fit to be forked after they are loaded.

With the first they ask torch for GPUs without initialising CUDA, which no fork survives. With the second pyarrow, which
pandas, datasets and often transformers load, starts no thread, which no fork has.
"""


class PoolDiedError(SimulationError):
    """The process from which ranks are forked is gone."""


class Pool:
    """A process that has loaded torch, of which every rank is a fork."""

    def __init__(self, environ: dict[str, str], spoilers: frozenset[str] = frozenset()) -> None:
        self.spoilers = spoilers
        self.owner = os.getpid()
        self._known: dict[str, None] = {}
        self._ends = 0
        self._log = memory_file()
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control.settimeout(_PATIENCE)
        with theirs:
            self._process = self._start(theirs, environ)

    def _start(self, theirs: socket.socket, environ: dict[str, str]) -> subprocess.Popen[bytes]:
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
        path = [*map(str, sys.path), os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))]
        return subprocess.Popen(
            [sys.executable, *flags, "-c", _START, str(theirs.fileno()), json.dumps(path)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            start_new_session=True,
            env={"OMP_NUM_THREADS": "1", **environ, **FORK_SAFE},
        )

    def close(self) -> None:
        """End the process and all ranks, unless this process is a fork of the one that started it."""
        self.control.close()
        if self.owner != os.getpid():
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._log)

    def is_spoiled(self) -> bool:
        """Whether something that the process has loaded keeps it from starting ranks; ends those that it has.

        Raises:
            PoolDiedError: the process is gone.
        """
        if self.owner != os.getpid() or self._process.poll() is not None:
            raise self.death()
        before = self.spoilers
        self.end_ranks()
        return self.spoilers != before

    def tell(self, descriptors: Sequence[int] = (), **command: Any) -> None:
        """Give the process a command."""
        try:
            socket.send_fds(self.control, [json.dumps(command).encode()], descriptors)
        except OSError as error:
            raise self.death() from error

    def end_ranks(self) -> None:
        """Kill all ranks and what they have started; afterwards nothing of them is left."""
        self._ends += 1
        self.tell(do="end", number=self._ends)
        while (event := self.hear())["event"] != "ended" or event["number"] != self._ends:
            pass

    def hear(self) -> dict[str, Any]:
        """What the process tells next."""
        try:
            message = self.control.recv(1 << 16)
        except OSError as error:
            raise self.death() from error
        if not message:
            raise self.death()
        event: dict[str, Any] = json.loads(message)
        if event["event"] == "spoiled":
            self.spoilers |= {event["package"]}
        return event

    def death(self) -> PoolDiedError:
        """The error that says that the process has died."""
        log = read_text(self._log).strip()
        return PoolDiedError(f"the process that starts ranks has died{': ' if log else ''}{log}")

    def learn(self, outcomes: Sequence[Outcome | None], environ: dict[str, str]) -> None:
        """Have the process load what ranks had to load, for the ranks of later runs."""
        self._load((name for outcome in outcomes if outcome is not None for name in outcome.modules), environ)

    def learn_from(self, other: Pool, environ: dict[str, str]) -> None:
        """Have the process load what ``other`` knew, in whose place it comes."""
        self._load(other._known, environ)

    def _load(self, names: Iterable[str], environ: dict[str, str]) -> None:
        found = dict.fromkeys(names)
        modules = [name for name in found if name not in self._known and name.partition(".")[0] not in self.spoilers]
        if not modules:
            return
        self._known.update(dict.fromkeys(modules))
        wanted = memory_file(pickle.dumps({"modules": modules, "environ": environ, "path": sys.path}))
        try:
            self.tell([wanted], do="import")
        finally:
            os.close(wanted)


class SharedPool:
    """The pools of this process, one for each backend: made when first needed, ended when nobody holds them."""

    def __init__(self) -> None:
        self._holders: WeakSet[Any] = WeakSet()
        self._lock = threading.Lock()
        self._pools: dict[str, Pool] = {}

    def hold(self, holder: object) -> None:
        """Have the pools stay until ``holder`` lets it go."""
        self._holders.add(holder)

    def let_go(self, holder: object) -> None:
        """End the pools if nobody else holds them, after the current run. A holder that is dropped ends nothing."""
        self._holders.discard(holder)
        if not self._holders:
            with self._lock:
                self.drop()

    @contextlib.contextmanager
    def borrow(self, backend: str, environ: dict[str, str]) -> Iterator[Pool]:
        """The pool of a backend, for one run: other threads wait until it is over."""
        with self._lock:
            yield self._fit_pool(backend, environ)

    def _fit_pool(self, backend: str, environ: dict[str, str]) -> Pool:
        pool = self._pools.get(backend)
        try:
            while pool is not None and pool.is_spoiled():
                spoiled, pool = pool, self._replace(backend, pool, environ)
                pool.learn_from(spoiled, environ)
        except PoolDiedError:  # perhaps of what it loaded: the next one is not told to
            assert pool is not None
            pool = self._replace(backend, pool, environ)
        if pool is None:
            pool = self._pools[backend] = Pool(environ)
        return pool

    def _replace(self, backend: str, pool: Pool, environ: dict[str, str]) -> Pool:
        pool.close()
        fresh = self._pools[backend] = Pool(environ, pool.spoilers)
        return fresh

    def drop(self) -> None:
        """End the pools, whoever uses them."""
        while self._pools:
            self._pools.popitem()[1].close()

    def forget_lock(self) -> None:
        """In a fork of this process, nobody holds the lock."""
        self._lock = threading.Lock()


shared = SharedPool()
atexit.register(shared.drop)
os.register_at_fork(after_in_child=shared.forget_lock)
