"""A run that is killed anywhere and resumed ends as if nothing had happened, bit by bit."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from trainer_parts import EvenTokens, parts, prompts, weights_of

from lightrft.errors import CheckpointError, RankFailedError
from lightrft.sim import SimWorld
from lightrft.trainer import SPMDPPOTrainer

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]

ITERATIONS = 3
SETTINGS = {
    "advantage_estimator": "gae", "n_samples_per_prompt": 2, "max_epochs": 2, "kl_target": 0.5, "kl_horizon": 50,
    "normalize_reward": True, "save_steps": 1, "num_episodes": 2,
}  # fmt: skip
STAGES = ("generate", "reward", "backward", "step", "sync", "before the critic is saved", "before the actor is saved")


class KilledError(Exception):
    """The end of a process."""


def kill_at(trainer, rewards, stage, step):
    """Let rank 1 (or a rank alone) end in a stage of an iteration."""
    strategy = trainer.strategy
    if strategy.get_rank() != strategy.world_size - 1:
        return

    def deadly(call, when=lambda *args, **more: True):
        def called(*args, **more):
            if trainer.state.step == step and when(*args, **more):
                raise KilledError
            return call(*args, **more)

        return called

    if stage == "reward":
        rewards.hook = deadly(lambda: None)
    elif stage == "generate":
        strategy.inference_engine.generate = deadly(strategy.inference_engine.generate)
    elif "saved" in stage:
        # The step is counted before it is saved.
        name = stage.split()[2]
        call = strategy.save_ckpt

        def save_ckpt(model, save_dir, **more):
            if trainer.state.step == step + 1 and save_dir.endswith(name):
                raise KilledError
            return call(model, save_dir, **more)

        strategy.save_ckpt = save_ckpt
    else:
        name = {"backward": "backward", "step": "optimizer_step", "sync": "update_engine_weights"}[stage]
        setattr(strategy, name, deadly(getattr(strategy, name)))


class Rewards(EvenTokens):
    hook = staticmethod(lambda: None)

    def __call__(self, samples):
        self.hook()
        return super().__call__(samples)


def run(folder, *, size=2, killed=None, resume=False, log=False, iterations=ITERATIONS, max_ckpt_num=3, **backend):
    """What a run ends with, on its first rank; ``None`` if it is killed."""

    def program():
        rewards = Rewards()
        logs = {"log_dir": str(folder / "logs")} if log else {}
        made = parts(ema=True, dropout=0.1, max_norm=0.5, **logs, **backend)
        settings = {**SETTINGS, "max_steps": iterations, "max_ckpt_num": max_ckpt_num}
        trainer = SPMDPPOTrainer(reward_model=rewards, **made, **settings, ckpt_path=str(folder), resume=resume)
        if killed is not None:
            kill_at(trainer, rewards, *killed)
        metrics = trainer.fit(prompts(24))
        found = weights_of(trainer), _plain(metrics), trainer.state.state_dict(), torch.get_rng_state()
        if dist.is_initialized():
            dist.destroy_process_group()
        return found

    if killed is None:
        return SimWorld(size, stall_limit=15).run(program)[0]
    with pytest.raises(RankFailedError, match="KilledError"):
        SimWorld(size, stall_limit=15).run(program)
    return None


def _plain(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "tokens_per"))}


def assert_same(found, expected):
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(found[0][name], tensor), name
    assert found[1:3] == expected[1:3]
    assert torch.equal(found[3], expected[3])


@pytest.fixture(scope="module", autouse=True)
def _quick_disk():
    """What a disk does is not what is tested here, and waiting for it takes most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)
        yield


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


CASES = [(stage, place % ITERATIONS) for place, stage in enumerate(STAGES)]
EVERY = [(stage, step) for stage in STAGES for step in range(ITERATIONS)]


@pytest.mark.parametrize(
    ("stage", "step"), [pytest.param(*case, marks=() if case in CASES else pytest.mark.slow) for case in EVERY]
)
def test_f18_killed_anywhere_and_resumed_is_uninterrupted(stage, step, uninterrupted, tmp_path):
    run(tmp_path, killed=(stage, step))
    assert_same(run(tmp_path, resume=True), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("backend", [{"fsdp": True}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str)
@pytest.mark.parametrize("stage", ["backward", "before the actor is saved"])
def test_f18_killed_and_resumed_on_real_backends(stage, backend, tmp_path):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    expected = run(tmp_path / "whole", iterations=2, **backend)
    run(tmp_path / "killed", killed=(stage, 1), iterations=2, **backend)
    assert_same(run(tmp_path / "killed", resume=True, iterations=2, **backend), expected)


def test_f18_killed_twice(uninterrupted, tmp_path):
    run(tmp_path, killed=("reward", 1))
    run(tmp_path, killed=("step", 2), resume=True)
    assert_same(run(tmp_path, resume=True), uninterrupted)


def test_f18_a_run_that_is_over_stays_as_it_is(uninterrupted, tmp_path):
    run(tmp_path)
    found = run(tmp_path, resume=True)
    assert all(torch.equal(found[0][name], tensor) for name, tensor in uninterrupted[0].items())
    assert found[2] == uninterrupted[2]


def test_f18_the_average_of_a_rank_alone_goes_with_the_run(tmp_path):
    """Nothing prepares the averaged model of a fake strategy that is alone."""

    def alone(folder, iterations, resume=False):
        made = parts(dropout=0.1)
        made["ema_model"] = type(made["initial_model"].module)()
        trainer = SPMDPPOTrainer(
            reward_model=EvenTokens(), **made, max_steps=iterations, ckpt_path=str(folder), resume=resume
        )
        trainer.fit(prompts(24))
        return dict(made["ema_model"].state_dict())

    expected = alone(tmp_path / "whole", 2)
    alone(tmp_path / "parts", 1)
    found = alone(tmp_path / "parts", 2, resume=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_f18_the_log_goes_on_where_the_checkpoint_was(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    run(tmp_path, killed=("before the actor is saved", 1), log=True)
    file = tmp_path / "logs" / "metrics.jsonl"
    before = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["step"] for entry in before] == [1, 2]
    file.write_text(file.read_text() + '{"step": 3, "rew')  # a line that was cut off
    run(tmp_path, resume=True, log=True)
    after = [json.loads(line) for line in file.read_text().splitlines()]
    assert [entry["step"] for entry in after] == [1, 2, 3]
    assert after[1]["reward"] == before[1]["reward"]


def test_without_a_checkpoint_a_run_begins(uninterrupted, tmp_path):
    assert_same(run(tmp_path, resume=True), uninterrupted)


def test_checkpoints_are_rotated_and_one_that_is_not_whole_is_told(tmp_path):
    run(tmp_path, max_ckpt_num=1)
    assert sorted(each.name for each in (tmp_path / "actor").glob("step_*")) == ["step_00000003"]
    assert sorted(each.name for each in (tmp_path / "critic").glob("step_*")) == ["step_00000002", "step_00000003"]
    shutil.rmtree(tmp_path / "critic" / "step_00000003")
    with pytest.raises(RankFailedError) as error:
        run(tmp_path, resume=True)
    assert isinstance(error.value.__cause__, CheckpointError)


@pytest.mark.filterwarnings("ignore:the checkpoints that have to stay")
def test_k24_checkpoints_may_have_so_much_memory(tmp_path):
    made = parts()
    SPMDPPOTrainer(
        reward_model=EvenTokens(), **made, ckpt_path=str(tmp_path), save_steps=1, max_ckpt_mem=1e-9, max_steps=2
    ).fit(prompts(24))
    assert [each.name for each in (tmp_path / "actor").glob("step_*")] == ["step_00000002"]


def test_a_checkpoint_of_something_else_is_told(tmp_path):
    made = parts(critic=False)
    made["strategy"].save_ckpt(made["actor"], str(tmp_path / "actor"), client_state={"epoch": 3})
    settings = {"advantage_estimator": "reinforce", "ckpt_path": str(tmp_path), "resume": True}
    with pytest.raises(CheckpointError, match="no checkpoint of a run of the trainer: its client state has epoch"):
        SPMDPPOTrainer(reward_model=EvenTokens(), **made, **settings).fit(prompts(8))
