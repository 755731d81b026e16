"""The trainer with a model of transformers that sees: prompts with and without images in one batch."""

import dataclasses

import pytest
import torch.distributed as dist
from trainer_parts import Draws, EvenTokens

from lightrft.datasets import Prompt
from lightrft.sim import SimWorld
from lightrft.strategy import get_strategy
from lightrft.trainer import SPMDPPOTrainer

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries below


BACKENDS = [{"strategy": "fake"}, {"fsdp": True}, {"zero_stage": 2}, {"zero_stage": 3}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from lightrft.models.tiny import tiny_vision_model

    path = str(tmp_path_factory.mktemp("model"))
    tiny_vision_model(path)
    return path


class Sees(Draws):
    """An engine that expands image tokens, as engines do: one for each 28 x 28 pixels."""

    def _drawn(self, request, params, digest, sample):
        from lightrft.models import tiny

        images = iter(request.images)
        tokens = []
        for token in request.prompt_token_ids:
            places = next(images).size[0] // 28 if token == tiny.IMAGE else 1
            tokens += [token] * places
        drawn = super()._drawn(request, params, digest, sample)
        return dataclasses.replace(drawn, prompt_token_ids=tuple(tokens))


def pictures(number):
    return tuple(Image.new("RGB", (28 * (1 + i), 28), (40 * number % 256, 90 * i, 7)) for i in range(number % 3))


def prompts(count, seen=True):
    """Prompts with none, one or two images; the first ones, of rank 0 without shuffling, among them."""
    from lightrft.models import tiny

    found = []
    for index in range(count):
        images = pictures(index) if seen else ()
        seen = (tiny.VISION_START, tiny.IMAGE, tiny.VISION_END) * len(images)
        found.append(Prompt(prompt=f"p{index}", token_ids=(*seen, 10 + index), images=images, index=index, label=index))
    return found


def run(folder, size, steps=2, seen=True, engine=None, **given):
    def program():
        from lightrft.models import Actor, tiny

        strategy = get_strategy({
            "pretrain": folder, "train_batch_size": 8, "micro_train_batch_size": 2, "rollout_batch_size": 8,
            "micro_rollout_batch_size": 2, "prompt_max_len": 48, "generate_max_len": 4, "actor_learning_rate": 1e-2,
            "lr_scheduler": "constant", "mixed_mm_data": True, **given,
        })  # fmt: skip
        with strategy.init_model_context():
            actor = Actor.from_pretrained(folder, settings=strategy.config)
            initial = Actor.from_pretrained(folder, settings=strategy.config)
        actor, _, _, initial = strategy.prepare_models_and_optimizers(actor, None, None, initial, None, 4)
        if engine is None:
            strategy.inference_engine = Sees()
        else:
            strategy.setup_inference_engine(engine_type=engine)
        trainer = SPMDPPOTrainer(
            strategy=strategy, actor=actor[0], reward_model=EvenTokens(), initial_model=initial, actor_optim=actor[1],
            actor_scheduler=actor[2], processor=tiny.image_processor(), advantage_estimator="reinforce++",
            max_steps=steps,
        )  # fmt: skip
        metrics = trainer.fit(prompts(16, seen))
        dist.destroy_process_group()
        return {name: value for name, value in metrics.items() if not name.startswith(("time", "tokens_per"))}

    found = SimWorld(size, stall_limit=60).run(program)
    assert all(each == found[0] for each in found)
    assert (found[0]["kl"] != 0) == (steps > 1)
    assert found[0]["actor/grad_norm"] > 0
    assert found[0]["samples"] == 8
    return found[0]


def test_k06_images_in_the_loop_on_the_fake_backend(folder):
    run(folder, 2, strategy="fake", engine_tp_size=2)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("fused", [False, True])
def test_f16_the_importance_ratio_of_a_model_that_sees_is_one(engine, fused, folder):
    """The engine never draws the tokens of images, and what they would have had of the probability others have."""
    found = run(folder, 1, steps=1, engine=engine, strategy="fake", temperature=0.7, fused_linear_logprob=fused)
    assert found["mismatch/ratio"] == pytest.approx(1, abs=1e-5)
    assert 0 < found["mismatch/log_prob"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"packing_samples": True}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:], ids=str)
def test_k06_images_in_the_loop_on_every_backend(backend, more, folder):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    run(folder, 2, engine_tp_size=2, **backend, **more)
    found = run(folder, 2, steps=1, **backend, **more)
    assert found == pytest.approx(run(folder, 2, steps=1, strategy="fake"), abs=1e-4, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", [{"strategy": "fake"}, {"fsdp": True}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str
)
def test_k06_a_model_that_sees_learns_from_text_alone(backend, folder):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    found = run(folder, 2, steps=1, seen=False, **backend)
    assert found == pytest.approx(run(folder, 2, steps=1, seen=False, strategy="fake"), abs=1e-4, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "backend", [{"strategy": "fake"}, {"fsdp": True}, {"zero_stage": 2}, {"zero_stage": 3}], ids=str
)
def test_k06_the_fake_engines_run_a_model_that_sees(backend, engine, folder):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")
    found = run(folder, 2, engine=engine, engine_tp_size=2, **backend)
    assert found["mismatch/ratio"] == pytest.approx(1, abs=1e-4)
