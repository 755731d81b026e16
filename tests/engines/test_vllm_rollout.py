"""The example that generates, trains and generates again, with vLLM on real processes and with the fake engine."""

import pytest
from launches import output_of, simulated, torchrun

ROLLOUT = "examples/strategy/rollout.py"

pytestmark = pytest.mark.processes


def told(command):
    return [
        line
        for line in output_of(command, seconds=300).splitlines()
        if line.startswith(("iteration", "rank", "log-probs"))
    ]


@pytest.mark.parametrize("size", ["1", "2"])
def test_vllm_on_two_processes_generates_the_tokens_of_the_simulator(size):
    flags = ["--fsdp", "--engine_tp_size", size]
    expected = told(simulated(2, ROLLOUT, *flags))
    assert len(expected) == 2 * (2 + 2)
    assert told(torchrun(2, ROLLOUT, *flags)) == expected
