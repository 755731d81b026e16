"""Training of real libraries: whole commands beside torchrun, and the simulator's own share of a step."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from dataclasses import dataclass

from benchmarks.groups import ROOT, in_fresh_process, now
from benchmarks.quiet import quietest

RANKS = 8
REPETITIONS = 3
ATTEMPTS = 5
_ABORTED = "terminate called without an active exception"

COMMANDS = {
    "FSDP2": ["examples/sim/fsdp2.py"],
    "ZeRO-2": ["examples/sim/deepspeed_zero.py", "--stage", "2"],
    "ZeRO-3": ["examples/sim/deepspeed_zero.py", "--stage", "3"],
}
"""Ten steps of a tiny transformer each."""


@dataclass(frozen=True)
class Commands:
    """Seconds from command to exit, for each repetition."""

    simulated: list[float]
    torchrun: list[float]

    @property
    def speedup(self) -> float:
        """How many times as fast the simulated ranks are: the median over neighbours."""
        ratios = sorted(real / ours for ours, real in zip(self.simulated, self.torchrun, strict=True))
        return ratios[len(ratios) // 2]


@functools.cache
def commands(name: str) -> Commands:
    """The same script by ``lightrft sim`` and by ``torchrun``, in turns, 8 ranks each."""
    script = COMMANDS[name]
    simulated = ["lightrft", "sim", "-n", str(RANKS), "--no-report"]
    real = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    _seconds([*simulated, *script])  # the first command compiles and reads from the disk what the others find
    pairs = quietest(lambda: (_seconds([*simulated, *script]), _seconds([*real, *script])), REPETITIONS)
    return Commands([ours for ours, _ in pairs], [theirs for _, theirs in pairs])


def _seconds(command: list[str]) -> float:
    """Seconds of a run that went well: a process of gloo now and then aborts as its interpreter ends."""
    for _ in range(ATTEMPTS):
        seconds, status, errors = _timed(command)
        if status == 0:
            return seconds
        if _ABORTED not in errors:
            break
    raise RuntimeError(f"{' '.join(command)}: exit status {status}\n{errors}")


def _timed(command: list[str]) -> tuple[float, int, str]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environ.pop("PYTHONDONTWRITEBYTECODE", None)  # installed packages are compiled when they are installed
    begin = now()
    done = subprocess.run([sys.executable, "-m", *command], env=environ, cwd=ROOT, capture_output=True, check=False)
    return now() - begin, done.returncode, done.stderr.decode()


@functools.cache
def shares() -> list[dict[str, float]]:
    """For some steps of FSDP2 on 8 simulated ranks: ``step`` in ms, and ``share`` that the simulator takes of it."""
    return quietest(lambda: in_fresh_process("training_child"), REPETITIONS)
