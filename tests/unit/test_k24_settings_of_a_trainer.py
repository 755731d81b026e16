"""Every setting of the trainer has an effect."""

from pathlib import Path

import pytest
import torch
from trainer_parts import Draws, EvenTokens, parts, prompts, weights_of
from trainer_worlds import in_world, trained

from lightrft.errors import ConfigError
from lightrft.strategy.setting import settings_of
from lightrft.trainer import SPMDPPOTrainer, TrainerConfig

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


BASE = {"n_samples_per_prompt": 4, "init_kl_coef": 0.05, "max_epochs": 2, "whiten_advantages": False, "lambd": 0.9}


EFFECTS = [
    {"advantage_estimator": "reinforce"}, {"advantage_estimator": "rloo"}, {"advantage_estimator": "grpo"},
    {"advantage_estimator": "reinforce++"}, {"advantage_estimator": "reinforce_baseline"},
    {"advantage_estimator": "dr_grpo"}, {"policy_loss": "gspo"}, {"policy_loss": "gmpo"}, {"policy_loss": "cispo"},
    {"policy_loss": "cpgd"}, {"loss_aggregation": "sequence_mean"}, {"loss_aggregation": "constant"},
    {"eps_clip_low": 0.01}, {"eps_clip_high": 0.01}, {"value_clip": 0.01}, {"gamma": 0.5}, {"lambd": 0.5},
    {"whiten_advantages": True}, {"entropy_coef": 0.1}, {"high_entropy_token_ratio": 0.3}, {"policy_drift_coef": 1.0},
    {"importance_cap": 1.0}, {"max_epochs": 1}, {"ema_beta": 0.5}, {"init_kl_coef": 0.5}, {"kl_estimator": "k3"},
    {"use_kl_loss": True}, {"kl_target": 0.001, "kl_horizon": 20}, {"n_samples_per_prompt": 2}, {"temperature": 0.7},
    {"normalize_reward": True}, {"reward_clip": 0.3}, {"overlong_buffer_len": 4},
    {"overlong_buffer_len": 4, "overlong_penalty": 0.5}, {"num_episodes": 2}, {"max_steps": 1},
]  # fmt: skip


@pytest.fixture(scope="module")
def base_run():
    return weights_after({})


def weights_after(settings):
    sizes = {"train_batch_size": 16, "micro_train_batch_size": 16, "micro_rollout_batch_size": 32}
    made = parts(ema=True, lr=3e-2, **sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **more: None)
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made, **{**BASE, **settings})
    trainer.fit(prompts(16))
    return weights_of(trainer)


@pytest.mark.parametrize("settings", EFFECTS, ids=str)
def test_k24_a_setting_changes_what_is_learned(settings, base_run):
    found = weights_after(settings)
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, base_run[name])]
    if settings == {"ema_beta": 0.5}:
        assert changed
        assert all(name.startswith("ema.") for name in changed)
    elif settings == {"value_clip": 0.01}:
        assert any(name.startswith("critic.") for name in changed)
    else:
        assert any(name.startswith("actor.") for name in changed)


ELSEWHERE = {
    "dynamic_sampling": "test_k11_dynamic_sampling_takes_every_rank_through_the_same_rounds",
    "dynamic_sampling_rounds": "test_k11_dynamic_sampling_takes_every_rank_through_the_same_rounds",
    "top_p": "test_k24_settings_of_sampling_reach_the_engine",
    "eval_temperature": "test_k24_settings_of_sampling_reach_the_engine",
    "eval_steps": "test_evaluations_are_due_every_few_iterations_and_at_the_end",
    "progress_bar": "test_k24_a_progress_bar_is_for_terminals",
    "save_path": "test_k24_the_trained_model_is_written_at_the_end",
    "reward_function": "test_rewards_come_from_what_is_given_and_from_settings",
    "remote_reward_url": "test_rewards_come_from_what_is_given_and_from_settings",
    "reward_weights": "test_rewards_come_from_what_is_given_and_from_settings",
    "remote_reward_timeout": "test_k24_settings_of_services",
    "remote_reward_attempts": "test_k24_settings_of_services",
    "offload_reward_models": "test_several_models_score_in_turn_and_ranks_pass_equally_often",
    "ckpt_path": "test_f18_killed_anywhere_and_resumed_is_uninterrupted",
    "save_steps": "test_f18_killed_anywhere_and_resumed_is_uninterrupted",
    "resume": "test_f18_killed_anywhere_and_resumed_is_uninterrupted",
    "max_ckpt_num": "test_checkpoints_are_rotated_and_one_that_is_not_whole_is_told",
    "max_ckpt_mem": "test_k24_checkpoints_may_have_so_much_memory",
}


def test_k24_every_setting_has_a_test_of_its_effect():
    assert {name for each in EFFECTS for name in each} | set(ELSEWHERE) == set(settings_of(TrainerConfig))
    written = "".join(file.read_text() for file in Path(__file__).parent.glob("test_*.py"))
    assert all(f"def {test}(" in written for test in ELSEWHERE.values())


def test_the_same_settings_learn_the_same(base_run):
    found = weights_after({})
    assert all(torch.equal(tensor, base_run[name]) for name, tensor in found.items())


def test_the_average_follows_the_actor():
    def program():
        made = parts(ema=True)
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made, ema_beta=0.75, max_steps=1)
        before = weights_of(trainer)
        trainer.fit(prompts(8))
        after = weights_of(trainer)
        for name, tensor in after.items():
            if name.startswith("ema."):
                expected = 0.75 * before[name] + 0.25 * after[name.replace("ema.", "actor.")]
                torch.testing.assert_close(tensor, expected)

    in_world(program)


def test_the_weight_of_the_divergence_is_adapted_alike_on_all_ranks():
    found = trained(kl_target=1.0, kl_horizon=8, init_kl_coef=0.1)
    assert found[0][0]["kl_coef"] == found[1][0]["kl_coef"] != 0.1


def test_k24_settings_of_sampling_reach_the_engine():
    asked = []

    class Noting(Draws):
        def generate(self, requests, sampling_params):
            asked.append(sampling_params)
            return super().generate(requests, sampling_params)

    made = parts(engine=Noting())
    settings = {"temperature": 0.7, "top_p": 0.9, "n_samples_per_prompt": 3, "eval_temperature": 0.25, "eval_steps": 1}
    SPMDPPOTrainer(reward_model=EvenTokens(), **made, **settings, max_steps=2).fit(prompts(16), prompts(2))
    found = [(one.temperature, one.top_p, one.n, one.max_tokens, one.logprobs) for one in asked]
    training, evaluation = (0.7, 0.9, 3, 6, True), (0.25, 1.0, 1, 6, True)
    assert found == [evaluation, training, evaluation, training, evaluation]
    assert asked[1].seed != asked[3].seed


def test_f01_a_run_whose_engine_drops_its_weights_is_the_same_and_each_iteration_sends_them():
    def run(level):
        made = parts(engine_sleep_level=level)
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made, eval_steps=1, max_steps=2)
        metrics = trainer.fit(prompts(16), prompts(2))
        asked = [call for call in made["strategy"].inference_engine.asked if call.startswith(("update", "sleep"))]
        told = {name: value for name, value in metrics.items() if not name.startswith(("time", "tokens_per"))}
        return weights_of(trainer), told, asked, made["strategy"].engine_updates

    (light, told, _, _), (deep, told_of_deep, asked, updates) = run(1), run(2)
    assert all(torch.equal(light[name], tensor) for name, tensor in deep.items())
    assert told == told_of_deep
    # An evaluation after each update of the trainer (1, 3, 5), and a rollout that has to send them again (2, 4).
    assert asked == [call for version in (1, 2, 3, 4, 5) for call in (f"update {version}", "sleep 2")]
    assert updates == 3


def test_an_engine_that_takes_no_seeds_gets_none():
    class Seedless(Draws):
        takes_seeds = False

        def generate(self, requests, sampling_params):
            assert sampling_params.seed is None
            return super().generate(requests, sampling_params)

    SPMDPPOTrainer(reward_model=EvenTokens(), **parts(engine=Seedless()), max_steps=1).fit(prompts(8))


def test_a_correction_needs_log_probs_of_what_was_drawn_from():
    trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(), temperature=0.7, importance_cap=2.0)
    with pytest.raises(ConfigError, match="importance_cap needs the log-probs that the engine has drawn with"):
        trainer.fit(prompts(8))


def test_k24_the_trained_model_is_written_at_the_end(tmp_path):
    made = parts()
    trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made, save_path=str(tmp_path), max_steps=1)
    trainer.fit(prompts(8))
    found = pytest.importorskip("safetensors.torch").load_file(tmp_path / "model.safetensors")
    expected = {name: tensor for name, tensor in weights_of(trainer).items() if name.startswith("actor.")}
    assert all(torch.equal(found[name.removeprefix("actor.")], tensor) for name, tensor in expected.items())


def test_k24_a_progress_bar_is_for_terminals(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    for bar in (True, False):
        SPMDPPOTrainer(reward_model=EvenTokens(), **parts(), max_steps=2, progress_bar=bar).fit(prompts(16))
        found = capsys.readouterr()
        assert ("2/2" in found.err) is bar
        assert "step 2/2" in found.out
