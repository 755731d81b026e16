"""The trainer with models of transformers and the fake engines that run them, under every backend."""

import pytest
import torch
import torch.distributed as dist
from trainer_parts import EvenTokens, prompts

from lightrft.sim import SimWorld
from lightrft.strategy import get_strategy
from lightrft.trainer import SPMDPPOTrainer

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries below

GAE = {"advantage_estimator": "gae", "temperature": 0.7, "max_steps": 2}
GRPO = {
    "advantage_estimator": "grpo", "n_samples_per_prompt": 4, "use_kl_loss": True, "max_steps": 2, "entropy_coef": 0.01,
    "high_entropy_token_ratio": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from lightrft.models.tiny import tiny_text_model

    path = str(tmp_path_factory.mktemp("model"))
    tiny_text_model(path)
    return path


def run(folder, size, settings, reward_model=False, **given):
    """The metrics of a run by rank, without times."""

    def program():
        from lightrft.models import Actor, Critic, RewardModel

        strategy = get_strategy({
            "pretrain": folder, "train_batch_size": 8, "micro_train_batch_size": 2, "rollout_batch_size": 8,
            "micro_rollout_batch_size": 4, "prompt_max_len": 8, "generate_max_len": 8, "actor_learning_rate": 1e-2,
            "critic_learning_rate": 1e-2, "lr_scheduler": "constant", **given,
        })  # fmt: skip
        with strategy.init_model_context():
            actor = Actor.from_pretrained(folder, settings=strategy.config)
            torch.manual_seed(0)
            critic = Critic.from_pretrained(folder, settings=strategy.config)
            initial = Actor.from_pretrained(folder, settings=strategy.config)
            torch.manual_seed(1)
            judge = RewardModel.from_pretrained(folder, settings=strategy.config) if reward_model else None
        needs_critic = settings["advantage_estimator"] == "gae"
        actor, critic, judges, initial = strategy.prepare_models_and_optimizers(
            actor, critic if needs_critic else None, judge, initial, None, 4
        )
        strategy.setup_inference_engine()
        trainer = SPMDPPOTrainer(
            strategy=strategy, actor=actor[0], critic=critic[0], reward_model=[EvenTokens(), judges],
            initial_model=initial, ema_model=None, actor_optim=actor[1], critic_optim=critic[1],
            actor_scheduler=actor[2], critic_scheduler=critic[2], **settings,
        )  # fmt: skip
        metrics = trainer.fit(prompts(16))
        dist.destroy_process_group()
        return {name: value for name, value in metrics.items() if not name.startswith(("time", "tokens_per"))}

    found = SimWorld(size, stall_limit=60).run(program)
    assert all(each == found[0] for each in found)
    return found[0]


def check(found):
    assert found["mismatch/ratio"] == pytest.approx(1, abs=1e-4)
    assert found["mismatch/log_prob"] < 1e-4
    assert found["kl"] != 0
    assert found["actor/grad_norm"] > 0
    assert found["weight_version"] == 2


def same(found, expected):
    """Up to rounding, which a draw may magnify."""
    assert found == pytest.approx(expected, abs=2e-3, rel=2e-2)


def test_f16_a_run_on_the_fake_backend(folder):
    check(run(folder, 2, GAE, strategy="fake", engine_tp_size=2))


@pytest.fixture(scope="module")
def expected(folder):
    return {name: run(folder, 4, settings, strategy="fake") for name, settings in (("gae", GAE), ("grpo", GRPO))}


BACKENDS = [{"strategy": "fake"}, {"fsdp": True}, {"zero_stage": 2}, {"zero_stage": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("engine_tp_size", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize(("name", "settings"), [("gae", GAE), ("grpo", GRPO)])
def test_every_backend_and_engine_size_ends_alike(name, settings, backend, engine_tp_size, folder, expected):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    found = run(folder, 4, settings, engine_tp_size=engine_tp_size, **backend)
    check(found)
    same(found, expected[name])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize(
    "more",
    [{"packing_samples": True}, {"fused_linear_logprob": True, "chunk_size": 16}, {"gradient_checkpointing": True}],
    ids=str,
)
def test_k22_ways_to_compute_end_alike(more, backend, folder, expected):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    found = run(folder, 4, GRPO, engine_tp_size=2, **backend, **more)
    check(found)
    same(found, expected["grpo"])


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("name", ["gae", "grpo"])
def test_f14_sequence_parallelism_ends_alike(name, backend, folder):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    settings = {"gae": GAE, "grpo": GRPO}[name]
    found = run(folder, 4, settings, sp_size=2, engine_tp_size=2, **backend)
    check(found)
    same(found, run(folder, 2, settings, strategy="fake"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_sglang_generates_too(backend, folder):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    check(run(folder, 4, GAE, engine_type="sglang", engine_tp_size=2, **backend))


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_reward_model_beside_a_function(backend, offload, folder):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    settings = {**GAE, "offload_reward_models": offload, "reward_weights": "3,1"}
    found = run(folder, 2, settings, reward_model=True, **backend)
    check(found)
    assert found["reward"] == pytest.approx((3 * found["reward/even"] + found["reward/reward_model"]) / 4, abs=1e-5)
