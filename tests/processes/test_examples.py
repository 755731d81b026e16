"""The examples print the same on simulated ranks and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples" / "sim"

pytestmark = pytest.mark.processes


def start(*command):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", *command], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def losses(process):
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    return re.findall(r"^(?:step|epoch) \d+: loss .*$", output, re.MULTILINE)


def test_every_example_is_tried():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert {"ddp", "fsdp2", "deepspeed_zero", "tensor_parallel", "ulysses", "accelerate_fsdp2", "hf_trainer"} <= names


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_prints_the_losses_of_real_processes(example):
    simulated = start("lightrft", "sim", "-n", "2", str(example))
    real = start("torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(example))
    shown = losses(simulated)
    assert len(shown) >= 3
    assert shown == losses(real)


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_runs_on_eight_ranks(example):
    assert len(losses(start("lightrft", "sim", "-n", "8", str(example)))) >= 3
