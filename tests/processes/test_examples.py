"""The examples print the same on simulated ranks and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightrft import cli

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples" / "sim").glob("*.py"))
IN_TURN = ROOT / "tests" / "programs" / "in_turn.py"

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]


def start(*command, **streams):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, "-m", *map(str, command)], env=environ, text=True, **streams)


def losses(output):
    return re.findall(r"^(?:step|epoch) \d+: loss .*$", output, re.MULTILINE)


def by_script(output):
    """What each script printed that ``in_turn.py`` ran, by name."""
    _, *parts = re.split(r"^script (.*)\n", output, flags=re.MULTILINE)
    return {Path(script).stem: losses(shown) for script, shown in zip(parts[::2], parts[1::2], strict=True)}


def test_every_example_is_tried():
    names = {path.stem for path in EXAMPLES}
    assert {"ddp", "fsdp2", "deepspeed_zero", "tensor_parallel", "ulysses", "accelerate_fsdp2", "hf_trainer"} <= names


def test_the_examples_print_the_losses_of_real_processes(tmp_path, capsys):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    output, errors = tmp_path / "output", tmp_path / "errors"
    with output.open("w") as out, errors.open("w") as err:
        real = start(*torchrun, IN_TURN, *EXAMPLES, stdout=out, stderr=err)
    simulated = {}
    for example in EXAMPLES:
        status = cli.main(["sim", "-n", "2", "--no-report", str(example)])
        shown = capsys.readouterr()
        assert status == 0, shown.err
        simulated[example.stem] = losses(shown.out)
    assert real.wait(timeout=240) == 0, errors.read_text()
    assert min(map(len, simulated.values())) >= 3
    assert simulated == by_script(output.read_text())


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_on_eight_ranks_of_a_fresh_process(example):
    fresh = start("lightrft", "sim", "-n", 8, example, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    output, errors = fresh.communicate(timeout=180)
    assert fresh.returncode == 0, errors
    assert len(losses(output)) >= 3
