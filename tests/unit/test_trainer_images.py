"""Prompts with images beside prompts without, on ranks that share the weights of what sees."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from trainer_parts import Actor, Draws, EvenTokens, Scores, prompts

from lightrft.datasets import Prompt
from lightrft.errors import ConfigError, RankFailedError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import workload
from lightrft.strategy import get_strategy
from lightrft.trainer import SPMDPPOTrainer
from lightrft.trainer.experience import Experience
from lightrft.trainer.fillers import image_filler
from lightrft.trainer.generation import Generation
from lightrft.trainer.images import ImageReader, media_tokens
from lightrft.trainer.rewards import ModelReward
from lightrft.trainer.scoring import Scoring

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


class Seeing(Actor):
    """An actor with layers that only images reach, as the vision tower of a model has them."""

    def __init__(self, seed=0):
        super().__init__(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.eye = nn.ModuleList(workload.Block() for _ in range(2))
        self.seen = 0

    def forward(self, sequences, attention_mask, *, temperature=1.0, entropy=False, pixel_values=None):
        scores = super().forward(sequences, attention_mask, temperature=temperature, entropy=entropy)
        if pixel_values is None:
            return scores
        self.seen += len(pixel_values)
        for block in self.eye:
            pixel_values = block(pixel_values)
        return Scores(scores.log_probs + pixel_values.mean() * attention_mask[:, 1:], scores.entropy)


class Judge(Seeing):
    def forward(self, sequences, attention_mask, *, pixel_values=None):
        return super().forward(sequences, attention_mask, pixel_values=pixel_values).log_probs.sum(1).clone()


class Eyes:
    """A processor: an image is a number."""

    def image_processor(self, images, return_tensors):
        return {"pixel_values": torch.tensor(images).float().view(-1, 1, 1).expand(-1, 2, workload.WIDTH).clone()}


def program(pictured, backend, **more):
    """A run whose prompts have images where ``pictured`` says so; metrics, and how often each rank's model saw some."""

    def run():
        strategy = get_strategy({
            "train_batch_size": 8, "micro_train_batch_size": 2, "rollout_batch_size": 8,
            "micro_rollout_batch_size": 4, "prompt_max_len": 8, "generate_max_len": 6, **backend,
        })  # fmt: skip
        made = Seeing()
        optimizer = strategy.create_optimizer(made, lr=1e-2)
        actor, optimizer, _ = strategy.prepare((made, optimizer, None))
        strategy.inference_engine = Draws()
        judge = strategy.prepare_reward_model(Judge(1))
        trainer = SPMDPPOTrainer(
            strategy, actor, reward_model=[EvenTokens(), ModelReward(judge, strategy, micro_batch_size=2)],
            actor_optim=optimizer, advantage_estimator="reinforce++", init_kl_coef=0.0, processor=Eyes(), **more,
        )  # fmt: skip
        given = [
            dataclasses.replace(one, images=(float(one.index),) * (1 + one.index % 2)) if pictured(one.index) else one
            for one in prompts(16)
        ]
        metrics = trainer.fit(given)
        asked = [[one.images for one in several] for several in strategy.inference_engine.requests]
        dist.destroy_process_group()
        return {n: v for n, v in metrics.items() if not n.startswith(("time", "tokens"))}, made.seen, asked

    return run


@pytest.mark.parametrize(
    ("pictured", "backend"),
    [
        pytest.param(pictured, backend, id=f"{name}-{backend}")
        for name, pictured in {
            "one": lambda i: i == 5, "some": lambda i: i % 3 == 0, "all": lambda i: True, "none": lambda i: False
        }.items()
        for backend in ({"strategy": "fake"}, {"fsdp": True})
        if (name, backend) != ("none", {"fsdp": True})  # FSDP2 cannot accumulate where a layer never was in use
    ],
)  # fmt: skip
def test_k06_ranks_with_and_without_images_stay_in_step(pictured, backend):
    found = SimWorld(2, stall_limit=15).run(program(pictured, backend))
    assert found[0][0] == found[1][0]
    saw = any(pictured(index) for index in range(16))
    assert (found[0][1] > 0, found[1][1] > 0) == (saw, saw)
    asked = [images for rank in found for several in rank[2] for images in several]
    assert sorted(images for images in asked if images) == sorted(
        (float(index),) * (1 + index % 2) for index in range(16) if pictured(index)
    )


def test_without_the_filler_ranks_would_part():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightrft.trainer.experience_maker.image_filler", lambda samples, strategy: None)
        with pytest.raises(RankFailedError, match="the loss of some ranks does not reach eye"):
            SimWorld(2, stall_limit=15).run(program(lambda i: i == 5, {"strategy": "fake"}))


def test_a_filler_has_nothing_to_learn_from():
    one = Experience.placeholder()
    filler = dataclasses.replace(Experience.placeholder(), images=({"pixel_values": torch.ones(1)},))
    both = one.with_filler(filler)
    assert (len(both), both.has_images, bool(both.action_mask.any())) == (2, True, False)
    assert filler.with_filler(filler) is filler
    assert len(both.first(1)) == 1
    assert not both.first(1).has_images


def test_without_images_there_is_no_filler():
    assert image_filler([], get_strategy({"strategy": "fake", "train_batch_size": 1})) is None


def test_images_need_a_processor():
    strategy = get_strategy({"strategy": "fake", "train_batch_size": 1})
    strategy.inference_engine = Draws()
    given = [dataclasses.replace(one, images=(1.0,)) for one in prompts(1)]
    with pytest.raises(ConfigError, match="prompts were not read: a prompt has images: give the trainer a processor"):
        Generation(strategy=strategy)(given, 1)


def test_the_tokens_of_images_count_for_the_length_of_a_prompt():
    class Reader:
        merge_size = 2

        def __call__(self, images, return_tensors):
            grid = torch.tensor([[1, 2 * int(image), 4] for image in images])
            return {"pixel_values": torch.zeros(int(grid.prod(-1).sum()), 3), "image_grid_thw": grid}

    strategy = get_strategy({"strategy": "fake", "train_batch_size": 1, "prompt_max_len": 8, "generate_max_len": 4})
    strategy.inference_engine = Draws()
    # Of 4 tokens one is of the image, which becomes 2, 4 or 6.
    given = [Prompt(prompt="p", token_ids=(3,) * 4, images=(size,), index=size) for size in (1, 2, 3)]
    found = Generation(strategy=strategy, reader=ImageReader(Reader()))(given, 1)
    assert [one.index for one in found] == [1, 2]
    assert found[1].images["pixel_values"].shape == (16, 3)


def test_tokens_that_stand_for_images_are_never_drawn():
    asked = []

    class Noting(Draws):
        def generate(self, requests, sampling_params):
            asked.append(sampling_params.logit_bias)
            return super().generate(requests, sampling_params)

    strategy = get_strategy({"strategy": "fake", "train_batch_size": 1, "prompt_max_len": 8, "generate_max_len": 6})
    strategy.inference_engine = Noting()
    (free,) = Generation(strategy=strategy)(prompts(1), 1)
    (bound,) = Generation(strategy=strategy, forbidden=(4, 5))(prompts(1), 1)
    assert asked == [None, {4: -100.0, 5: -100.0}]
    # That engine gives the log-probs of the model, which are not those it draws with where tokens are forbidden.
    assert len(free.engine_log_probs) == len(free.output_token_ids)
    assert bound.engine_log_probs is None


def test_an_actor_that_gives_no_entropy_is_named():
    def actor(sequences, attention_mask, **_):
        return Scores(torch.zeros(sequences.shape)[:, 1:], None)

    batch = Experience.placeholder()
    assert Scoring()(actor, batch).entropy is None
    with pytest.raises(ConfigError, match="function gave no entropy: expected one for each token"):
        Scoring()(actor, batch, entropy=True)


def test_the_tokens_of_images_are_those_of_the_configuration():
    model = SimpleNamespace(config=SimpleNamespace(image_token_id=4, video_token_id=5))
    assert media_tokens(model) == (4, 5)
    assert media_tokens(Seeing()) == ()
