"""The examples print the same on simulated ranks and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launches import kill_with_children

EXAMPLES = Path(__file__).parents[2] / "examples" / "sim"

pytestmark = pytest.mark.processes


def start(*command):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-m", *command], env=environ, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def losses(process):
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return re.findall(r"^(?:step|epoch) \d+: loss .*$", output, re.MULTILINE)


def losses_under_torchrun(example):
    """Of a launch that ended well: after its last line a gloo process now and then aborts, or hangs, as it ends."""
    for last in (False, False, True):
        process = start("torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example))
        try:
            return losses(process)
        except (AssertionError, subprocess.TimeoutExpired):
            kill_with_children(process)
            if last:
                raise
    return None


def test_every_example_is_tried():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {"ddp", "fsdp2", "deepspeed_zero", "tensor_parallel", "ulysses", "accelerate_fsdp2", "hf_trainer"} <= names


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_prints_the_losses_of_real_processes(example):
    simulated = start("lightrft", "sim", "-n", "2", str(example))
    shown = losses(simulated)
    assert len(shown) >= 3
    assert shown == losses_under_torchrun(example)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs_on_eight_ranks(example):
    assert len(losses(start("lightrft", "sim", "-n", "8", str(example)))) >= 3
