"""The examples print the same on simulated ranks and in real processes."""

import re

import pytest
from launches import ROOT, output_of, simulated, told_by_processes, told_by_simulated_ranks, torchrun

EXAMPLES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples/sim").glob("*.py"))
ROLLOUT = "examples/strategy/rollout.py"
BACKENDS = {"FSDP2": ["--fsdp"], "ZeRO-3": ["--zero_stage", "3"]}

pytestmark = pytest.mark.processes


def losses(told):
    return re.findall(r"^(?:step|epoch) \d+: loss .*$", told, re.MULTILINE)


def test_every_example_is_tried():
    names = {example.rpartition("/")[2] for example in EXAMPLES}
    libraries = {"deepspeed_zero.py", "accelerate_fsdp2.py", "hf_trainer.py"}
    assert {"ddp.py", "fsdp2.py", "tensor_parallel.py", "ulysses.py"} | libraries <= names


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_the_losses_of_real_processes(example):
    shown = losses(told_by_simulated_ranks(2, example))
    assert len(shown) >= 3
    assert shown == losses(told_by_processes(2, example))


@pytest.mark.parametrize("name", ["ddp.py", "accelerate_fsdp2.py"])
def test_the_commands_that_launch_an_example_print_its_losses(name):
    example = f"examples/sim/{name}"
    shown = losses(output_of(simulated(2, example)))
    assert len(shown) >= 3
    assert shown == losses(output_of(torchrun(2, example)))


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_on_eight_ranks(example):
    assert len(losses(told_by_simulated_ranks(8, example))) >= 3


def rollouts(backend, *flags):
    told = told_by_simulated_ranks(8, ROLLOUT, *BACKENDS[backend], *flags).splitlines()
    return [line for line in told if line.startswith(("iteration", "rank", "log-probs"))]


@pytest.mark.parametrize(("backend", "vllm", "sglang"), [("FSDP2", "4", "2"), ("ZeRO-3", "2", "4")])
def test_one_script_generates_the_same_with_either_engine_and_any_number_of_ranks_sharing_it(backend, vllm, sglang):
    expected = rollouts(backend)
    assert [line.split(",")[0] for line in expected if not line.startswith("rank")] == [
        "iteration 0: weights 0",
        "log-probs of engine and trainer agree",
        "iteration 1: weights 1",
        "log-probs of engine and trainer agree",
    ]
    assert len(expected) == 4 + 2 * 8
    assert rollouts(backend, "--engine_type", "vllm", "--engine_tp_size", vllm) == expected
    assert rollouts(backend, "--engine_type", "sglang", "--engine_tp_size", sglang) == expected
