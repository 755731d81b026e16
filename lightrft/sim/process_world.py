"""``ProcessWorld(size).run(fn)``: run a function on N real processes, as ``SimWorld`` runs it on simulated ranks."""

from __future__ import annotations

import os
import pickle
import socket
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from lightrft.errors import ConfigError, SimulationError
from lightrft.sim.current import current_task
from lightrft.sim.process_pickle import pickle_call
from lightrft.sim.process_pool import shared
from lightrft.sim.process_rank import Outcome, Settings
from lightrft.sim.process_report import verdict
from lightrft.sim.process_run import Run
from lightrft.sim.process_shared import memory_file

__all__ = ["ProcessWorld"]

_BACKENDS = ("gloo", "nccl")


class ProcessWorld:
    """N real processes that run one function, each a fork of one process that has loaded torch.

    Args:
        size: number of ranks.
        backend: ``gloo`` hides GPUs from the ranks; ``nccl`` needs one for every rank of a node.
        gpus_per_node: ranks on a node; gives ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE`` and ``GROUP_RANK``.
        seed: seeds, with the rank, the generators of torch, Python and NumPy, as those of simulated ranks.
        limit: seconds (real) that a run may take.
        tagged: whether each line that a rank prints begins with ``[rank N]``.

    A world may run several functions, one after the other; each run starts N fresh ranks, and ends them with all that
    they have started. What ranks print goes to this process's ``sys.stdout`` and ``sys.stderr``.

    The process of which ranks are forks is shared by all worlds. It starts with the first run and ends with the last
    open world that is closed, at the latest with this process. Worlds that are dropped without :meth:`close` leave it.
    """

    def __init__(
        self,
        size: int,
        *,
        backend: str = "gloo",
        gpus_per_node: int = 8,
        seed: int = 0,
        limit: float = 60.0,
        tagged: bool = False,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ConfigError(_unknown(next(iter(unknown))))
        if type(size) is not int or size < 1:
            raise ConfigError(f"size={size!r}: expected the number of ranks, at least 1")
        if backend not in _BACKENDS:
            raise ConfigError(f"backend={backend!r} is unknown: expected one of {', '.join(_BACKENDS)}")
        if type(gpus_per_node) is not int or gpus_per_node < 1:
            raise ConfigError(f"gpus_per_node={gpus_per_node!r}: expected a number of at least 1")
        if limit <= 0:
            raise ConfigError(f"limit={limit!r}: expected a number of seconds above 0")
        self.size = size
        self.backend = backend
        self.gpus_per_node = gpus_per_node
        self.seed = seed
        self.limit = limit
        self.tagged = tagged
        self.replay = ""
        """The command that repeats the run, shown in reports; set by what starts it."""
        self._closed = False
        if backend == "nccl":
            self._check_gpus()
        shared.hold(self)

    def __repr__(self) -> str:
        return f"ProcessWorld({self.size}, backend={self.backend!r}, seed={self.seed})"

    def __enter__(self) -> ProcessWorld:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _check_gpus(self) -> None:
        import torch

        needed, found = min(self.size, self.gpus_per_node), torch.cuda.device_count()
        if found < needed:
            raise ConfigError(f"backend='nccl': {needed} ranks of a node need {needed} GPUs, found {found}")

    def close(self) -> None:
        """End what the world holds; the process that ranks are forks of ends if no other world is open."""
        if not self._closed:
            self._closed = True
            shared.let_go(self)

    def run(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> list[Any]:
        """Run ``fn(*args, **kwargs)`` on every rank.

        Function and arguments are pickled, and so is what a rank returns or raises; tensors come back on the CPU.

        Returns:
            the results, by rank.

        Raises:
            RankFailedError: ``fn`` raised on a rank, and that exception is the ``__cause__``; or a process died.
            CollectiveTimeoutError: the run took longer than ``limit`` seconds. Of real processes it cannot be known
                whether they would ever have gone on, so that this is never a ``DeadlockError``.
            SimulationError: the world is closed, or the function or an argument cannot be pickled.
        """
        if self._closed:
            raise SimulationError("this ProcessWorld is closed: make another one")
        if current_task() is not None:
            raise SimulationError("ProcessWorld.run was called inside a simulated rank")
        call = pickle_call(fn, args, kwargs)
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.backend == "gloo" else {}
        environ = {**os.environ, **hidden}
        with shared.borrow(self.backend, environ) as pool, _free_port() as holder:
            settings = self._settings(environ, holder.getsockname()[1])
            body = memory_file(pickle.dumps(settings), call)
            run = None
            try:
                run = Run(pool, self.size, body, tagged=self.tagged)
                went_well = run.drive(self.limit)
                outcomes = run.load_outcomes()
                pool.learn(outcomes, environ)
            finally:
                os.close(body)
                if run is not None:
                    run.close()
            if not went_well:
                raise verdict(self, run.ends, run.failed)
        return [_load_result(rank, outcome) for rank, outcome in enumerate(outcomes)]

    def _settings(self, environ: dict[str, str], port: int) -> Settings:
        return Settings(
            size=self.size,
            gpus_per_node=self.gpus_per_node,
            seed=self.seed,
            port=port,
            environ=environ,
            directory=os.getcwd(),
            path=sys.path,
            arguments=sys.argv,
        )


def _load_result(rank: int, outcome: Outcome | None) -> Any:
    assert outcome is not None
    assert outcome.result is not None
    try:
        return pickle.loads(outcome.result)
    except Exception as error:
        raise SimulationError(f"what rank {rank} returned cannot be loaded in this process: {error}") from error


def _unknown(name: str) -> str:
    from lightrft.sim.mark import WORLD_OPTIONS

    if name in WORLD_OPTIONS:
        return f"{name} is for simulated ranks only: real processes run as they do. Use SimWorld, or leave it out"
    return f"unknown argument {name!r}: expected one of backend, gpus_per_node, seed, limit, tagged"


def _free_port() -> socket.socket:
    """A socket that holds a port for the store of rank 0.

    It is bound but does not listen: the system gives the port to nobody who asks for any port, and whoever binds it by
    number with ``SO_REUSEADDR``, as torch's store does, may listen on it.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder
