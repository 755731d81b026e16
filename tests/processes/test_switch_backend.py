"""The script that switches its backend by a flag: the same losses everywhere, also after it was killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launches import kill_with_children

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/strategy/switch_backend.py"
FLAGS = {
    "FSDP2": ["--fsdp"],
    "ZeRO-1": ["--zero_stage", "1"],
    "ZeRO-2": ["--zero_stage", "2"],
    "ZeRO-3": ["--zero_stage", "3"],
    "fake": ["--strategy", "fake"],
}
STEPS = 6

pytestmark = pytest.mark.processes


def simulated(ranks):
    return [sys.executable, "-u", "-m", "lightrft", "sim", "-n", str(ranks), "--no-report", SCRIPT]


def torchrun(ranks):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, SCRIPT]


def start(command):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environ, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def steps_of(command):
    """What the script tells of each step, by number."""
    for last in (False, True):
        process = start(command)
        try:
            out, err = process.communicate(timeout=100)
            break
        except subprocess.TimeoutExpired:  # a gloo process now and then hangs while the interpreter ends
            kill_with_children(process)
            if last:
                raise
    # Or it aborts, after its last line.
    assert process.returncode == 0 or "terminate called without an active exception" in err, err[-3000:]
    return {line.split()[1]: line for line in out.splitlines() if line.startswith("step ")}


def killed_after(step, command):
    """Kill the script with all its processes once it has told of ``step``."""
    process = start(command)
    for line in process.stdout:
        if line.startswith(f"step {step} "):
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


@pytest.fixture(scope="module")
def expected():
    """The steps of one process alone, with the fake backend."""
    found = steps_of([sys.executable, SCRIPT, *FLAGS["fake"]])
    assert list(found) == [str(step) for step in range(1, STEPS + 1)]
    return found


@pytest.mark.parametrize("backend", FLAGS)
def test_the_losses_are_the_same_with_every_backend(backend, expected):
    assert steps_of([*simulated(4), *FLAGS[backend]]) == expected
    assert steps_of([*torchrun(2), *FLAGS[backend]]) == expected


SLURM = {
    "SLURM_PROCID": "0",
    "SLURM_NTASKS": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NODELIST": "localhost",
    "SLURM_JOB_ID": "7041",
}


@pytest.mark.parametrize("variables", [{}, SLURM], ids=["alone", "Slurm"])
@pytest.mark.parametrize("backend", ["FSDP2", "ZeRO-2"])
def test_a_process_without_torchrun_tells_the_same(backend, variables, expected, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert steps_of([sys.executable, SCRIPT, *FLAGS[backend]]) == expected


@pytest.mark.parametrize("backend", FLAGS)
def test_f18_killed_in_the_middle_it_goes_on_at_another_size(backend, expected, tmp_path):
    flags = [*FLAGS[backend], "--ckpt_path", str(tmp_path / "checkpoints")]
    killed_after(3, [*simulated(4), *flags])
    resumed = steps_of([*torchrun(2), *flags])
    assert resumed == {step: line for step, line in expected.items() if step in resumed}
    assert {"5", "6"} <= resumed.keys() <= {"4", "5", "6"}
