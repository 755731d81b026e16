"""The settings of the trainer, and their flags."""

import argparse
from pathlib import Path

import pytest

from lightrft.errors import ConfigError
from lightrft.strategy import StrategyConfig
from lightrft.strategy.arguments import flag_table
from lightrft.strategy.setting import settings_of
from lightrft.trainer.settings import TrainerConfig
from lightrft.utils import add_arguments, add_trainer_arguments

SETTINGS = settings_of(TrainerConfig)

# Every flag with words that set it to something other than its default, and what the configuration then holds.
FLAGS = {
    "--advantage_estimator": ("reinforce", "reinforce"),
    "--policy_loss": ("gspo", "gspo"),
    "--loss_aggregation": ("constant", "constant"),
    "--eps_clip_low": ("0.1", 0.1),
    "--eps_clip_high": ("0.28", 0.28),
    "--value_clip": ("0.5", 0.5),
    "--gamma": ("0.9", 0.9),
    "--lambd": ("0.95", 0.95),
    "--keep_advantages": ("", False),
    "--entropy_coef": ("0.01", 0.01),
    "--high_entropy_token_ratio": ("0.2", 0.2),
    "--policy_drift_coef": ("0.1", 0.1),
    "--importance_cap": ("2", 2.0),
    "--max_epochs": ("2", 2),
    "--ema_beta": ("0.9", 0.9),
    "--init_kl_coef": ("0.1", 0.1),
    "--kl_estimator": ("k2", "k2"),
    "--use_kl_loss": ("", True),
    "--kl_target": ("6", 6.0),
    "--kl_horizon": ("100", 100),
    "--n_samples_per_prompt": ("8", 8),
    "--temperature": ("0.7", 0.7),
    "--top_p": ("0.9", 0.9),
    "--dynamic_sampling": ("--n_samples_per_prompt 2", True),
    "--dynamic_sampling_rounds": ("2", 2),
    "--reward_function": ("a.py:f", "a.py:f"),
    "--remote_reward_url": ("http://h/", "http://h/"),
    "--remote_reward_timeout": ("5", 5.0),
    "--remote_reward_attempts": ("2", 2),
    "--reward_weights": ("1,2", "1,2"),
    "--offload_reward_models": ("", True),
    "--normalize_reward": ("", True),
    "--reward_clip": ("5", 5.0),
    "--overlong_buffer_len": ("16", 16),
    "--overlong_penalty": ("0.5", 0.5),
    "--num_episodes": ("3", 3),
    "--max_steps": ("7", 7),
    "--eval_steps": ("5", 5),
    "--eval_temperature": ("0.6", 0.6),
    "--no_progress_bar": ("", False),
    "--ckpt_path": ("ckpts", "ckpts"),
    "--save_steps": ("5 --ckpt_path c", 5),
    "--resume": ("--ckpt_path c", True),
    "--max_ckpt_num": ("1", 1),
    "--max_ckpt_mem": ("10", 10.0),
    "--save_path": ("out", "out"),
}
OFF = {"--keep_advantages": "whiten_advantages", "--no_progress_bar": "progress_bar"}


def parsed(words):
    return add_trainer_arguments(argparse.ArgumentParser()).parse_args(words.split())


def test_the_flags_are_those_of_the_settings():
    parser = add_trainer_arguments(argparse.ArgumentParser(add_help=False))
    assert set(parser._option_string_actions) == set(FLAGS) | {f"--{name}" for name in OFF.values()}
    assert {OFF.get(flag, flag[2:]) for flag in FLAGS} == set(SETTINGS)


@pytest.mark.parametrize("flag", FLAGS)
def test_k24_a_flag_changes_its_setting(flag):
    words, expected = FLAGS[flag]
    name = OFF.get(flag, flag[2:])
    assert getattr(TrainerConfig.from_args(parsed(f"{flag} {words}")), name) == expected
    assert getattr(TrainerConfig(), name) != expected


def test_flags_of_strategy_and_trainer_stand_side_by_side():
    assert not set(settings_of(StrategyConfig)) & set(SETTINGS)
    parser = add_trainer_arguments(add_arguments(argparse.ArgumentParser()))
    args = parser.parse_args(["--fsdp", "--gamma", "0.5"])
    strategy = StrategyConfig.from_args(args)
    assert strategy.fsdp
    assert TrainerConfig.from_args(args).gamma == 0.5
    assert TrainerConfig.from_args(strategy).gamma == 0.5
    assert TrainerConfig.from_args(strategy).extra_args["fsdp"] is True
    with pytest.raises(ConfigError, match="call add_trainer_arguments once"):
        add_trainer_arguments(parser)


def test_k08_a_wrong_choice_names_those_that_are_allowed():
    with pytest.raises(ConfigError, match="advantage_estimator='best': expected gae, reinforce, rloo"):
        TrainerConfig(advantage_estimator="best")
    with pytest.raises(ConfigError, match="'gama' is no setting: did you mean gamma"):
        TrainerConfig.from_args({}, gama=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage_estimator": "rloo"}, "advantage_estimator='rloo' compares the samples of a prompt"),
        ({"dynamic_sampling": True}, "dynamic_sampling compares the samples of a prompt"),
        ({"init_kl_coef": 0.0, "use_kl_loss": True}, "use_kl_loss with init_kl_coef=0"),
        ({"init_kl_coef": 0.0, "kl_target": 1.0}, "kl_target=1.0 with init_kl_coef=0"),
        ({"use_kl_loss": True, "kl_estimator": "k1"}, "kl_estimator='k1' as a loss"),
        ({"policy_loss": "gmpo", "eps_clip_low": 1.0}, "eps_clip_low=1 with policy_loss='gmpo'"),
        ({"save_steps": 1}, "save_steps needs ckpt_path"),
        ({"resume": True}, "resume needs ckpt_path"),
        ({"reward_weights": "1,x"}, "reward_weights='1,x': expected numbers"),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainerConfig(**settings)


def test_all_that_is_wrong_is_told_at_once():
    with pytest.raises(ConfigError) as error:
        TrainerConfig(advantage_estimator="grpo", resume=True, reward_weights="a")
    assert len(str(error.value).splitlines()) == 3


def test_settings_that_follow_from_others():
    assert (TrainerConfig().loss_aggregation, TrainerConfig().kl_estimator) == ("token_mean", "k1")
    assert TrainerConfig(policy_loss="gspo").loss_aggregation == "sequence_mean"
    assert TrainerConfig(policy_loss="gspo", loss_aggregation="token_mean").loss_aggregation == "token_mean"
    assert TrainerConfig(use_kl_loss=True).kl_estimator == "k3"
    assert TrainerConfig(reward_weights="1, 2.5").weights_of_rewards() == [1.0, 2.5]


def test_settings_that_do_not_fit_the_strategy_are_told_at_once():
    config = TrainerConfig(overlong_buffer_len=9)
    with pytest.raises(ConfigError) as error:
        config.check_strategy(StrategyConfig(generate_max_len=8, rollout_batch_size=10), 4)
    assert str(error.value).splitlines() == [
        "overlong_buffer_len=9 is larger than generate_max_len=8: expected at most that",
        "rollout_batch_size=10 is no multiple of 4 data parallel ranks: use rollout_batch_size=8 or 12",
    ]
    with pytest.raises(ConfigError, match="use rollout_batch_size=4$"):
        TrainerConfig().check_strategy(StrategyConfig(rollout_batch_size=3), 4)
    TrainerConfig().check_strategy(StrategyConfig(rollout_batch_size=8), 4)


def test_how_long_a_run_is():
    config = StrategyConfig(rollout_batch_size=8, train_batch_size=12)
    trainer = TrainerConfig(n_samples_per_prompt=4, max_epochs=2, num_episodes=3)
    assert trainer.iterations(20, config) == 7  # 60 prompts, 8 at a time
    assert trainer.optimizer_steps(20, config) == 7 * 2 * 3  # 32 samples, 12 at a time
    assert trainer.replace(max_steps=2).optimizer_steps(20, config) == 2 * 2 * 3


def test_the_documentation_has_a_table_of_the_flags():
    table = flag_table(TrainerConfig)
    assert all(f"`{flag}`" in table for flag in FLAGS)
    assert (Path(__file__).parents[2] / "docs/trainer.md").read_text().endswith(table)
