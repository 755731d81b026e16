"""The script that switches its backend by a flag: the same losses everywhere, also after it was killed."""

import os
import signal
import sys

import pytest
from launches import output_of, simulated, start, torchrun

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


def steps_of(command):
    """What the script tells of each step, by number."""
    return {line.split()[1]: line for line in output_of(command).splitlines() if line.startswith("step ")}


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
    assert steps_of([*simulated(4, SCRIPT), *FLAGS[backend]]) == expected
    assert steps_of([*torchrun(2, SCRIPT), *FLAGS[backend]]) == expected


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
    killed_after(3, [*simulated(4, SCRIPT), *flags])
    resumed = steps_of([*torchrun(2, SCRIPT), *flags])
    assert resumed == {step: line for step, line in expected.items() if step in resumed}
    assert {"5", "6"} <= resumed.keys() <= {"4", "5", "6"}
