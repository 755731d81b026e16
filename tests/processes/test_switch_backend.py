"""The script that switches its backend by a flag: the same losses everywhere, also after it was killed."""

import os
import signal
import sys

import pytest
from launches import output_of, simulated, start, told_by_processes, told_by_simulated_ranks, torchrun

from lightrft.sim.environ import torchrun_environ

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


def steps_of(told):
    """What the script tells of each step, by number."""
    return {line.split()[1]: line for line in told.splitlines() if line.startswith("step ")}


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
    found = steps_of(output_of([sys.executable, SCRIPT, *FLAGS["fake"]]))
    assert list(found) == [str(step) for step in range(1, STEPS + 1)]
    return found


@pytest.mark.parametrize("backend", FLAGS)
def test_the_losses_are_the_same_with_every_backend(backend, expected):
    assert steps_of(told_by_simulated_ranks(4, SCRIPT, *FLAGS[backend])) == expected
    assert steps_of(told_by_processes(2, SCRIPT, *FLAGS[backend])) == expected


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
    launcher = torchrun_environ(0, 1, gpus_per_node=1, port=1, threads="1").keys() - {"OMP_NUM_THREADS"}
    assert steps_of(told_by_processes(1, SCRIPT, *FLAGS[backend], without=launcher)) == expected


@pytest.mark.parametrize("backend", FLAGS)
def test_f18_killed_in_the_middle_it_goes_on_at_another_size(backend, expected, tmp_path):
    flags = [*FLAGS[backend], "--ckpt_path", str(tmp_path / "checkpoints")]
    killed_after(3, [*simulated(4, SCRIPT), *flags])
    launched = backend in ("FSDP2", "ZeRO-3")
    resumed = steps_of(output_of(torchrun(2, SCRIPT, *flags)) if launched else told_by_processes(2, SCRIPT, *flags))
    assert resumed == {step: line for step, line in expected.items() if step in resumed}
    assert {"5", "6"} <= resumed.keys() <= {"4", "5", "6"}
