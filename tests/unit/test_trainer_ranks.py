"""Ranks of a trainer: what belongs together stays together, and all of them go the same way."""

import pytest
import torch
import torch.distributed as dist
from trainer_parts import Draws, EvenTokens, parts, prompts, weights_of
from trainer_worlds import in_world, plain, too_long

from lightrft.datasets import Prompt
from lightrft.errors import RewardError, StaleWeightsError
from lightrft.strategy import get_strategy
from lightrft.trainer import SPMDPPOTrainer
from lightrft.trainer.generation import Generation

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


# -- K21: what belongs together stays together -------------------------------------------------------------------------


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


# -- K11: the same collective path for everybody -----------------------------------------------------------------------


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
