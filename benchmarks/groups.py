"""Three ways to run one function on N ranks: simulated, PyTorch's threaded process group, real gloo processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightrft.sim import SimWorld

ROOT = Path(__file__).parent.parent
CHILD_LIMIT_S = 240

Body = Callable[[int], Any]


def now() -> float:
    """Real seconds, inside a simulated rank too: there ``time.perf_counter`` shows virtual time."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def resident_mib() -> float:
    """Resident memory of this process (MiB)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def grown_mib(action: Callable[[], object]) -> float:
    """MiB by which the memory of this process grows at most during ``action``."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size from now on
    action()
    return max(0.0, _status("VmHWM") - before)


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 1024


def simulated(ranks: int, body: Body) -> list[Any]:
    """``body(rank)`` on simulated ranks, everything at its default: all state switched, all checks on."""

    def main() -> Any:
        dist.init_process_group("gloo")
        result = body(dist.get_rank())
        dist.barrier()
        dist.destroy_process_group()
        return result

    return SimWorld(ranks).run(main)


def threaded(ranks: int, body: Body) -> list[Any]:
    """``body(rank)`` on the threads of PyTorch's threaded process group, as its own test cases set it up."""
    from torch.testing._internal.distributed import multi_threaded_pg as pg

    results: list[Any] = [None] * ranks
    failures: list[BaseException] = []
    store = dist.HashStore()

    def main(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            torch._C._set_multithreading_enabled(False)
            results[rank] = body(rank)
            dist.barrier()
            dist.destroy_process_group()
        except BaseException as error:  # noqa: BLE001 - raised again below, after the other threads were let go
            failures.append(error)
            pg.ProcessLocalGroup.exception_handle(error)

    hook = sys.excepthook
    pg._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=main, args=(rank,)) for rank in range(ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        pg._uninstall_threaded_pg()
        pg.ProcessLocalGroup.reset()
        sys.excepthook = hook  # every init_process_group wraps it once more
    if failures:
        raise failures[0]
    return results


def threaded_on_one_core(ranks: int, body: Body) -> list[Any]:
    """As :func:`threaded`, pinned to one core as simulated ranks are."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        return threaded(ranks, body)
    finally:
        os.sched_setaffinity(0, allowed)


def gloo_processes(ranks: int) -> dict[str, Any]:
    """Start real processes (``benchmarks/gloo_child.py``); returns what their rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(ranks), f"{folder}/store"]
        children = [start_child("gloo_child", str(rank), *arguments) for rank in range(ranks)]
        results: list[dict[str, Any]] = [read_child(child) for child in children]
    return results[0]


def start_child(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Run a module of this folder in a process of its own."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.PIPE, text=True)


def read_child(child: subprocess.Popen[str]) -> Any:
    """Wait for the end of a child and return the JSON in its last line; libraries may have logged before it."""
    try:
        output, _ = child.communicate(timeout=CHILD_LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        raise
    if child.returncode != 0:
        raise RuntimeError(f"{child.args}: exit status {child.returncode}")
    return json.loads(output.splitlines()[-1]) if output else None


def in_fresh_process(module: str, *arguments: str) -> Any:
    """:func:`start_child` and :func:`read_child` in one."""
    return read_child(start_child(module, *arguments))
