"""The trainer: one loop for every backend, in the documented ways."""

import time

import pytest
import torch
from trainer_parts import Draws, EvenTokens, parts, prompts, weights_of
from trainer_worlds import in_world, plain, too_long, trained

from lightrft.errors import ConfigError, EngineStateError
from lightrft.sim.contracts.strategy import workload
from lightrft.strategy.requests import Completion
from lightrft.trainer import SPMDPPOTrainer, TrainerConfig

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


# -- One loop for every backend ----------------------------------------------------------------------------------------


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


# -- The documented ways to use it -------------------------------------------------------------------------------------


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
