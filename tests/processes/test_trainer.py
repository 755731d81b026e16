"""The trainer on real gloo processes: what simulated ranks do, they do."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
from launches import start, told_by_processes, told_by_simulated_ranks, torchrun
from trainer_parts import EvenTokens, parts, prompts, weights_of

from lightrft.sim import ProcessWorld, SimWorld

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]

SCRIPT = "tests/programs/train_and_stop.py"
BACKENDS = [{}, {"fsdp": True}, {"zero_stage": 2}, {"zero_stage": 3}]


def learns(settings):
    from lightrft.trainer import SPMDPPOTrainer

    trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(**settings), max_steps=1)
    metrics = trainer.fit(prompts(8))
    found = weights_of(trainer)
    dist.destroy_process_group()
    return {name: value for name, value in metrics.items() if not name.startswith(("time", "tokens_per"))}, found


@pytest.mark.parametrize("settings", BACKENDS, ids=str)
def test_processes_learn_what_simulated_ranks_learn(settings):
    if "zero_stage" in settings:
        pytest.importorskip("deepspeed")
    (metrics, weights), _ = ProcessWorld(2).run(learns, settings)
    (expected, others), _ = SimWorld(2).run(learns, settings)
    assert metrics == pytest.approx(expected, abs=1e-5)
    for name, tensor in others.items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-5, rtol=0, msg=name)


def test_f18_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    flags = ["--strategy", "fake", "--save_steps", "100", "--max_steps", "4", "--ckpt_path"]
    expected = told(told_by_processes(2, SCRIPT, *flags, str(tmp_path / "whole")))
    process = start([*torchrun(2, SCRIPT), *flags, str(tmp_path / "stopped")])
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith("step 1/"):
            os.killpg(process.pid, signal.SIGINT)
            break
    rest, _ = process.communicate(timeout=60)
    assert "stopped after iteration" in seen + rest
    resumed = told_by_processes(2, SCRIPT, *flags, str(tmp_path / "stopped"), "--resume")
    assert "resumed after iteration" in resumed
    assert told(seen + rest) | told(resumed) == expected
    simulated = told_by_simulated_ranks(2, SCRIPT, *flags, str(tmp_path / "simulated"))
    assert told(simulated).keys() == expected.keys()


def told(output):
    """The rewards and losses of each iteration, by its number."""
    lines = [line for line in output.splitlines() if line.startswith("step ")]
    return {line.split()[1]: line.partition("  tokens/s")[0] for line in lines}
