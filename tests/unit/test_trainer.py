"""The trainer's loop on simulated ranks."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from trainer_parts import Draws, EvenTokens, parts, prompts, weights_of

from lightrft.datasets import Prompt
from lightrft.errors import ConfigError, EngineStateError, RankFailedError, RewardError, StaleWeightsError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import workload
from lightrft.strategy import get_strategy
from lightrft.strategy.requests import Completion
from lightrft.strategy.setting import settings_of
from lightrft.trainer import SPMDPPOTrainer, TrainerConfig
from lightrft.trainer.generation import Generation
from lightrft.trainer.run_log import summary_line
from lightrft.trainer.stopping import StopRequest

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


def in_world(program, size=2, **more):
    def on_rank():
        try:
            return program()
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    return SimWorld(size, stall_limit=15, **more).run(on_rank)


def trained(size=2, count=32, reward=None, given=None, strategy=None, **settings):
    """Metrics and weights after a run."""

    def program():
        trainer = SPMDPPOTrainer(reward_model=reward or EvenTokens(), **parts(**(strategy or {})), **settings)
        return trainer.fit(given or prompts(count)), weights_of(trainer)

    return in_world(program, size)


def plain(metrics):
    return {name: value for name, value in metrics.items() if not name.startswith(("time/", "tokens_per"))}


# -- One loop for every backend ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_agree_and_the_engine_has_the_last_weights(size):
    def program():
        engine = Draws()
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(engine=engine))
        metrics = trainer.fit(prompts(32))
        weights = weights_of(trainer)
        assert engine.weight_version == 5  # before the first iteration, and after each
        assert str(engine.status) == "asleep"
        for name, tensor in engine.weights.items():
            assert torch.equal(tensor, weights[f"actor.{name}"])
        return metrics, weights

    first, *others = in_world(program, size)
    for other in others:
        assert plain(other[0]) == plain(first[0])
        assert all(torch.equal(first[1][name], other[1][name]) for name in first[1])
    assert first[0]["samples"] == 8
    assert first[0]["weight_version"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("backend", [{"fsdp": True}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str)
def test_every_backend_ends_as_the_fake_one_does(backend):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    found, expected = (trained(count=8, strategy=each)[0] for each in (backend, {}))
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, atol=5e-5, rtol=0, msg=name)
    assert plain(found[0]) == pytest.approx(plain(expected[0]), abs=1e-4)


class Policy(Draws):
    """An engine that draws from the weights that it was sent."""

    _built = 0

    def _drawn(self, request, params, digest, sample):
        model = self._model()
        generator = torch.Generator().manual_seed(params.seed + 1000 * sample + sum(request.prompt_token_ids))
        tokens = list(request.prompt_token_ids)
        with torch.no_grad():
            for _ in range(params.max_tokens):
                logits = model(torch.tensor([tokens]))[0, -1] / params.temperature
                tokens.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
        output = tuple(tokens[len(request.prompt_token_ids) :])
        every = torch.tensor([tokens])
        return Completion(
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=output,
            log_probs=tuple(self._log_probs(model, every, params.temperature)[-len(output) :].tolist()),
            log_probs_mode="processed",
            weight_version=self.weight_version,
            text="",
        )

    def _model(self):
        if self._built != self.weight_version:
            self._cached = workload.transformer()
            weights = {name.removeprefix("model."): tensor for name, tensor in self.weights.items()}
            self._cached.load_state_dict(weights)
            self._built = self.weight_version
        return self._cached

    @torch.no_grad()
    def _log_probs(self, model, tokens, temperature):
        every = (model(tokens)[0, :-1] / temperature).log_softmax(-1)
        return every.gather(1, tokens[0, 1:].unsqueeze(1)).squeeze(1)


def test_f16_the_importance_ratio_is_one_at_another_temperature_too():
    for size in (1, 2):
        metrics = trained(size, 8, strategy={"engine": Policy()} if size == 1 else None, temperature=0.7)[0][0]
        if size == 1:
            assert metrics["mismatch/ratio"] == pytest.approx(1, abs=1e-5)
            assert metrics["mismatch/log_prob"] < 1e-5
        else:
            assert metrics["mismatch/log_prob"] == 0  # that engine gives raw ones, which cannot be compared


def test_the_reward_grows():
    """REINFORCE on the share of even tokens, drawn from the policy itself."""

    rewards = []

    def program():
        made = parts(engine=Policy(), critic=False, initial=False, lr=5e-2, generate_max_len=3)
        settings = {"advantage_estimator": "grpo", "n_samples_per_prompt": 4, "init_kl_coef": 0.0}
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made, **settings)
        once = trainer.iteration
        trainer.iteration = lambda stream: rewards.append(once(stream)) or rewards[-1]
        trainer.fit(prompts(64))

    program()
    assert rewards[0]["reward"] < 0.6
    assert rewards[-1]["reward"] > 0.8


PARTITIONS = [(1, 4), (1, 1), (2, 4), (2, 1), (4, 2)]


@pytest.fixture(scope="module")
def big_batch():
    return {name: partitioned(name, 1, 16) for name in WAYS}


WAYS = {
    "gae": {"advantage_estimator": "gae", "entropy_coef": 0.1, "value_clip": 0.01},
    "reinforce++": {"advantage_estimator": "reinforce++", "use_kl_loss": True, "loss_aggregation": "sequence_mean"},
    "grpo": {"advantage_estimator": "grpo", "policy_loss": "gspo", "normalize_reward": True},
    "dr_grpo": {"advantage_estimator": "dr_grpo", "loss_aggregation": "constant", "high_entropy_token_ratio": 0.5},
}


def partitioned(name, size, micro):
    """The weights of a run, its 16 samples an iteration spread over ranks and micro-batches; by SGD, not clipped."""

    def program():
        made = parts(
            critic=name == "gae", sgd=True, lr=0.1, max_norm=0.0, train_batch_size=16, micro_train_batch_size=micro
        )
        settings = {"n_samples_per_prompt": 2, "max_epochs": 2, "max_steps": 1}
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made, **settings, **WAYS[name])
        trainer.fit([too_long(i) if i in (2, 5) else one for i, one in enumerate(prompts(8))])
        return weights_of(trainer)

    return in_world(program, size)[0]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("size", "micro"), PARTITIONS)
def test_f13_an_iteration_does_not_depend_on_how_it_is_cut(name, size, micro, big_batch):
    for key, tensor in partitioned(name, size, micro).items():
        torch.testing.assert_close(tensor, big_batch[name][key], atol=1e-6, rtol=0, msg=key)


# -- The documented ways to use it ---------------------------------------------------------------------------------


def test_the_documented_ppo_train_runs_as_it_is_written(capsys):
    class MyTrainer(SPMDPPOTrainer):
        def ppo_train(self, global_steps=0):
            torch.cuda.synchronize()
            train_begin = time.time()

            # Load optimizer states from CPU to GPU (FSDP only)
            self.strategy.maybe_load_optimizer(self.actor_optim)

            # Perform training
            train_ret = super().ppo_train(global_steps)

            # Offload optimizer states from GPU to CPU (FSDP only)
            self.strategy.maybe_offload_optimizer(self.actor_optim)

            torch.cuda.synchronize()
            self.strategy.print(f"PPO Train TIMECOST {time.time() - train_begin}")

            # Synchronize actor weights to inference engine
            self.strategy.update_engine_weights(self.actor)

            return train_ret

    def program(cls):
        engine = Draws()
        trainer = cls(reward_model=EvenTokens(), **parts(engine=engine, fsdp=True))
        trainer.fit(prompts(24))
        return engine.weight_version, weights_of(trainer)

    mine = in_world(lambda: program(MyTrainer), cuda=True)
    assert capsys.readouterr().out.count("PPO Train TIMECOST") == 3
    theirs = in_world(lambda: program(SPMDPPOTrainer), cuda=True)
    assert mine[0][0] == theirs[0][0] == 4  # each iteration sends the weights once
    assert all(torch.equal(mine[0][1][name], tensor) for name, tensor in theirs[0][1].items())


def test_settings_come_from_the_arguments_of_the_strategy_and_from_keywords():
    made = parts(gamma=0.5, n_samples_per_prompt=2, critic=False)
    trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made, advantage_estimator="rloo", gamma=0.25)
    found = (trainer.config.gamma, trainer.config.n_samples_per_prompt, trainer.config.advantage_estimator)
    assert found == (0.25, 2, "rloo")
    config = TrainerConfig(advantage_estimator="reinforce", gamma=0.75)
    assert SPMDPPOTrainer(reward_model=EvenTokens(), **made, config=config).config.gamma == 0.75
    with pytest.raises(ConfigError, match="'gama' is no setting"):
        SPMDPPOTrainer(reward_model=EvenTokens(), **made, gama=0.5)


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        ({"critic": False}, {}, "advantage_estimator='gae' needs a critic"),
        ({"initial": False}, {}, "init_kl_coef=0.01 needs initial_model"),
        ({}, {"overlong_buffer_len": 7}, "overlong_buffer_len=7 is larger than generate_max_len=6"),
    ],
)
def test_models_and_settings_that_do_not_fit_are_told(made, settings, message):
    with pytest.raises(ConfigError, match=message):
        SPMDPPOTrainer(reward_model=EvenTokens(), **parts(**made), **settings)


def test_what_is_missing_or_needless_is_told():
    made = parts()
    with pytest.raises(ConfigError, match="actor_optim is missing"):
        SPMDPPOTrainer(reward_model=EvenTokens(), **{**made, "actor_optim": None})
    with pytest.warns(UserWarning, match="advantage_estimator='reinforce' needs no critic"):
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made, advantage_estimator="reinforce")
    made["strategy"].inference_engine = None
    with pytest.raises(EngineStateError, match="call strategy.setup_inference_engine"):
        trainer.fit(prompts(8))
    made["strategy"].inference_engine = Draws()
    with pytest.raises(ConfigError, match="7 prompts with rollout_batch_size=8"):
        trainer.fit(prompts(7))


def test_the_optimizer_takes_as_many_steps_as_the_settings_say():
    def program():
        made = parts()
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made, n_samples_per_prompt=3, max_epochs=2, max_steps=2)
        trainer.fit(prompts(32))
        return made["actor_scheduler"].last_epoch, trainer.config.optimizer_steps(32, made["strategy"].config)

    assert in_world(program) == [(12, 12)] * 2


def test_the_interface_is_the_documented_one():
    import inspect

    given = inspect.signature(SPMDPPOTrainer).parameters
    assert list(given) == [
        "strategy", "actor", "critic", "reward_model", "initial_model", "ema_model", "actor_optim", "critic_optim",
        "actor_scheduler", "critic_scheduler", "tokenizer", "processor", "config", "settings",
    ]  # fmt: skip
    assert [name for name in vars(SPMDPPOTrainer) if not name.startswith("_")] == [
        "fit", "iteration", "ppo_train", "evaluate", "save", "request_stop"
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_in_which_ranks_run_changes_nothing(seed):
    def program():
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(), max_steps=2)
        return plain(trainer.fit(prompts(16)))

    expected = in_world(program, 4)
    assert in_world(program, 4, schedule="random", seed=seed) == expected


# -- K21: what belongs together stays together ---------------------------------------------------------------------


@pytest.mark.parametrize("sp_size", [1, 2])
def test_k21_prompts_labels_and_samples_stay_aligned(sp_size):
    def program():
        settings = {"strategy": "fake", "train_batch_size": 4, "engine_tp_size": 2, "sp_size": sp_size}
        strategy = get_strategy({**settings, "prompt_max_len": 8, "generate_max_len": 6})
        strategy.inference_engine = Draws()
        rank = strategy.groups.dp_rank
        mine = [Prompt(prompt=f"p{rank}{i}", token_ids=(2, rank, i), label=(rank, i), index=i) for i in range(rank + 1)]
        return [
            (one.prompt, one.label, one.prompt_token_ids, one.response, len(one.engine_log_probs))
            for one in Generation(strategy=strategy, n=3)(mine, seed=1)
        ], strategy.groups.dp_rank

    for found, rank in in_world(program, 4):
        assert [one[:4] for one in found] == [
            (f"p{rank}{i}", (rank, i), (2, rank, i), f"answer {sample} to {(2, rank, i)}")
            for i in range(rank + 1)
            for sample in range(3)
        ]


def test_k21_rewards_belong_to_their_samples():
    seen = []

    def reward(asked, responses, labels):
        seen.extend(zip(asked, responses, labels, strict=True))
        return [float(label) for label in labels]

    def program():
        trainer = SPMDPPOTrainer(
            reward_model=reward, **parts(critic=False), advantage_estimator="dr_grpo", n_samples_per_prompt=2
        )
        taken = []
        trainer.ppo_train = lambda steps: taken.extend(trainer.replay_buffer._rows) or {}
        trainer.fit(prompts(8))
        return [(int(row.rewards), row.sequences[0, :4].tolist()) for row in taken]

    every = {one.index: one.token_ids for one in prompts(8)}
    for found in in_world(program):
        assert len(found) == 8
        assert all(tokens[: len(every[label])] == list(every[label])[:4] for label, tokens in found)
    assert all(asked == f"p{label}" and f"to {every[label]}" in response for asked, response, label in seen)


def test_old_completions_are_refused_on_every_rank():
    class Late(Draws):
        def generate(self, requests, sampling_params):
            import dataclasses

            return [dataclasses.replace(one, weight_version=0) for one in super().generate(requests, sampling_params)]

    def program():
        engine = Late() if dist.is_initialized() and dist.get_rank() == 1 else Draws()
        made = parts()
        made["strategy"].inference_engine = Late() if made["strategy"].get_rank() == 1 else engine
        with pytest.raises(StaleWeightsError, match="rank 1: some came of the weights of version 0"):
            SPMDPPOTrainer(reward_model=EvenTokens(), **made).fit(prompts(8))

    in_world(program)


def test_k10_a_reward_that_fails_on_one_rank_is_an_error_on_all():
    def program():
        def reward(asked, responses, labels):
            if made["strategy"].get_rank() == 1:
                raise ValueError("no such label")
            return [0.0] * len(asked)

        made = parts()
        with pytest.raises(RewardError, match="rank 1: the reward function reward raised ValueError: no such label"):
            SPMDPPOTrainer(reward_model=reward, **made).fit(prompts(8))

    in_world(program)


# -- K11: the same collective path for everybody -------------------------------------------------------------------


def too_long(index):
    return Prompt(prompt="long", token_ids=(3,) * 9, index=index)


@pytest.mark.parametrize(
    ("estimator", "backend"), [("gae", {}), ("reinforce++", {}), ("grpo", {}), ("gae", {"fsdp": True})], ids=str
)
def test_k11_a_rank_whose_prompts_are_all_too_long_goes_along(estimator, backend):
    given = [one if i % 2 == 0 else too_long(i) for i, one in enumerate(prompts(16))]

    def program():
        made = parts(critic=estimator == "gae", **backend)
        strategy = made["strategy"]
        loader = strategy.setup_dataloader
        strategy.setup_dataloader = lambda *args, **more: loader(*args, **more, shuffle=False)
        settings = {"advantage_estimator": estimator, "n_samples_per_prompt": 2, "normalize_reward": True}
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made, **settings)
        metrics = trainer.fit(given)
        return metrics, weights_of(trainer)

    first, second = in_world(program)
    assert first[0]["prompts_too_long"] == 0.5
    assert first[0]["samples"] == 8
    assert plain(first[0]) == plain(second[0])
    assert all(torch.equal(first[1][name], tensor) for name, tensor in second[1].items())
    assert all(tensor.isfinite().all() for tensor in first[1].values())


def test_k11_nobody_has_anything_to_learn():
    def program():
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts())
        before = weights_of(trainer)
        metrics = trainer.fit([too_long(i) for i in range(8)])
        after = weights_of(trainer)
        assert metrics["samples"] == metrics["reward"] == 0
        assert metrics["prompts_too_long"] == 1
        assert all(torch.equal(before[name], after[name]) for name in before)

    in_world(program)


@pytest.mark.parametrize("backend", [{}, {"fsdp": True}], ids=str)
def test_k11_a_loss_that_is_nan_on_one_rank_skips_the_step_on_all(backend):
    class Broken(EvenTokens):
        def __init__(self, at):
            self.at = at

        def __call__(self, samples):
            found = super().__call__(samples)
            if dist.get_rank() == self.at:
                found.rewards[0] = torch.nan
            return found

    def program(at):
        made = parts(**backend)
        trainer = SPMDPPOTrainer(reward_model=Broken(at), **made, whiten_advantages=False, value_clip=0.0)
        before = weights_of(trainer)
        metrics = trainer.fit(prompts(8))
        after = weights_of(trainer)
        return metrics, all(torch.equal(before[name], after[name]) for name in before)

    for metrics, unchanged in in_world(lambda: program(1)):
        assert unchanged
        assert metrics["policy_loss"] != metrics["policy_loss"]  # NaN is reported
    assert not in_world(lambda: program(None))[0][1]


@pytest.mark.parametrize("informative", [0, 1])
def test_k11_dynamic_sampling_takes_every_rank_through_the_same_rounds(informative):
    """Prompts of rank 0 are informative or not; those of rank 1 always are."""

    def program():
        made = parts(critic=False)
        rank = made["strategy"].get_rank()
        asked = []

        def reward(prompts_, responses, labels):
            asked.append(len(prompts_))
            return [float(i % 2 and (rank or informative)) for i in range(len(prompts_))]

        trainer = SPMDPPOTrainer(
            reward_model=reward, **made, advantage_estimator="grpo", n_samples_per_prompt=2, dynamic_sampling=True,
            dynamic_sampling_rounds=3, max_steps=1,
        )  # fmt: skip
        metrics = trainer.fit(prompts(32))
        return metrics, asked, trainer.state.consumed_prompts

    found = in_world(program)
    rounds = 1 if informative else 3
    assert [each[1] for each in found] == [[8] * rounds] * 2
    assert [each[2] for each in found] == [8 * rounds] * 2
    # Rank 1 keeps its share alone: what more it found is left out.
    assert found[0][0]["samples"] == (16 if informative else 8)
    assert found[0][0]["informative_prompts"] == (1.0 if informative else 0.5)


# -- K24: every setting of the algorithm has an effect -------------------------------------------------------------

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
    "eval_steps": "test_evaluations_are_due_every_few_iterations",
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


# -- Evaluation, logs, stopping ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "size"), [(11, 2), (1, 2), (8, 4)])
def test_every_prompt_is_evaluated_once(count, size):
    def program():
        seen = []

        def reward(asked, responses, labels):
            seen.extend(labels)
            return {"reward": [float(label) for label in labels], "accuracy": [1.0] * len(labels)}

        trainer = SPMDPPOTrainer(reward_model=reward, **parts())
        trainer._sync_engine()
        found = trainer.evaluate(prompts(count))
        return found, seen

    results = in_world(program, size)
    assert sorted(label for _, seen in results for label in seen) == list(range(count))
    assert results[0][0]["eval/reward"] == pytest.approx(sum(range(count)) / count)
    assert results[0][0]["eval/accuracy"] == 1
    assert [found for found, _ in results] == [results[0][0]] * size


def test_evaluations_are_due_every_few_iterations(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")

    def program():
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(log_dir=str(tmp_path)), eval_steps=2)
        trainer.fit(prompts(32), eval_prompts=prompts(3))

    in_world(program)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/reward" in line] == [0, 2, 4]


def test_what_people_and_programs_see_of_a_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def program():
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(log_dir=str(tmp_path)))
        return trainer.fit(prompts(24))

    last = in_world(program)[0]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in printed] == ["1/3", "2/3", "3/3"]
    for word in ("reward 0.", "accuracy ", "kl ", "length ", "policy loss", "value loss", "grad norm"):
        assert all(word in line for line in printed)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert entries[-1]["reward"] == last["reward"]
    assert {"time/generate", "time/reward", "time/score", "time/train", "time/sync"} <= set(entries[-1])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [each.value for each in events.Scalars("reward")] == pytest.approx([entry["reward"] for entry in entries])
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_line_of_an_iteration_by_hand():
    metrics = {"reward": 0.5, "kl": 0.25, "tokens_per_second": 1234.4, "time/generate": 1.5, "time/sync": 0.001}
    expected = "step 3/8  reward 0.5000  kl 0.2500  tokens/s 1234  (generate 1.50s)"
    assert summary_line(3, 8, metrics) == expected


def test_a_log_that_cannot_be_opened_is_an_error_on_all_ranks(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "logs").write_text("a file")

    def program():
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(log_dir=str(tmp_path / "logs")))
        with pytest.raises(ConfigError, match="the log was not opened: rank 0: FileExistsError"):
            trainer.fit(prompts(8))

    in_world(program)


def test_a_full_disk_ends_no_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(log_dir=str(tmp_path)), max_steps=2)

    def full(self, folder, step, metrics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightrft.trainer.run_log.RunLog._write", full)
    trainer.fit(prompts(16))
    assert "the metrics of step 2 were not written" in capsys.readouterr().out


def test_one_rank_may_ask_to_stop():
    def program():
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts())
        once = trainer.ppo_train

        def ppo_train(global_steps=0):
            if global_steps == 1 and trainer.strategy.get_rank() == 1:
                trainer.request_stop()
            return once(global_steps)

        trainer.ppo_train = ppo_train
        trainer.fit(prompts(32))
        return trainer.state.step

    assert in_world(program) == [2, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_ends(number, tmp_path):
    before = signal.getsignal(number)

    def reward(asked, responses, labels):
        signal.raise_signal(number)
        return [0.0] * len(asked)

    trainer = SPMDPPOTrainer(reward_model=reward, **parts(), ckpt_path=str(tmp_path))
    trainer.fit(prompts(32))
    assert trainer.state.step == 1
    assert (tmp_path / "actor" / "step_00000001").is_dir()
    assert signal.getsignal(number) is before


def test_a_later_ctrl_c_interrupts_at_once():
    with StopRequest(patience=0.0) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_made
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_ctrl_c_that_a_launcher_passes_on_is_the_same_one():
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.is_made
    with stop:
        assert not stop.is_made


def test_an_error_of_one_rank_ends_the_run_of_all():
    def program():
        made = parts()
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made)
        if made["strategy"].get_rank() == 0:
            made["strategy"].inference_engine.failure = RuntimeError("the engine is gone")
        trainer.fit(prompts(8))

    with pytest.raises(RankFailedError, match="the engine is gone"):
        in_world(program)
