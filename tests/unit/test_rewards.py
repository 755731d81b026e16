"""Rewards of functions, of models and of mixtures."""

import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightrft.errors import ConfigError, OffloadStateError, RewardError
from lightrft.sim import SimWorld
from lightrft.strategy import get_strategy
from lightrft.trainer.experience import Sample
from lightrft.trainer.rewards import FunctionReward, ModelReward, RemoteReward, RewardMixture, reward_source
from lightrft.trainer.settings import TrainerConfig

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


def sample(number, length=2):
    return Sample(
        prompt=f"p{number}", response=f"r{number}", label=number, prompt_token_ids=(number,),
        output_token_ids=(number,) * length,
    )  # fmt: skip


SAMPLES = [sample(number) for number in range(3)]


def doubled(prompts, responses, labels):
    return [2 * label for label in labels]


def with_accuracy(prompts, responses, labels):
    return {"reward": torch.tensor(labels).float(), "accuracy": [label > 0 for label in labels]}


# -- functions -----------------------------------------------------------------------------------------------------


def test_a_function_sees_prompts_responses_and_labels():
    seen = []

    def reward(prompts, responses, labels):
        seen.append((prompts, responses, labels))
        return [0, 1.5, True]

    found = FunctionReward(reward)(SAMPLES)
    assert seen == [(["p0", "p1", "p2"], ["r0", "r1", "r2"], [0, 1, 2])]
    assert found.rewards.tolist() == [0.0, 1.5, 1.0]


def test_a_function_may_report_more():
    found = FunctionReward(with_accuracy)(SAMPLES)
    assert found.rewards.tolist() == [0, 1, 2]
    assert {name: each.tolist() for name, each in found.metrics.items()} == {"accuracy": [0, 1, 1]}


def test_k11_a_function_is_not_asked_for_nothing():
    def reward(prompts, responses, labels):
        raise AssertionError

    assert FunctionReward(reward)([]).rewards.shape == (0,)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0, 2.0], "the reward function reward returned 2 rewards: expected a number for each of 3 samples"),
        (None, "returned NoneType None"),
        ("abc", "returned str 'abc'"),
        (["a", "b", "c"], "returned 'a' for sample 0"),
        ([0, None, 0], "returned None for sample 1"),
        ([0, float("nan"), 0], "returned NaN for sample 1"),
        ({"score": [1, 2, 3]}, "a mapping with score: expected an entry 'reward'"),
        ({"reward": [1, 2, 3], "length": [1]}, "'length' returned 1 rewards"),
    ],
    ids=str,
)
def test_an_answer_that_holds_no_rewards_is_told(answer, message):
    def reward(prompts, responses, labels):
        return answer

    with pytest.raises(RewardError, match=message):
        FunctionReward(reward)(SAMPLES)


def test_a_function_that_raises_is_named():
    def reward(prompts, responses, labels):
        return 1 / 0

    with pytest.raises(RewardError, match="the reward function reward raised ZeroDivisionError: division by zero"):
        FunctionReward(reward)(SAMPLES)


def test_a_function_is_loaded_from_a_file(tmp_path):
    file = tmp_path / "rewards.py"
    file.write_text("LIMIT = 3\n\ndef score(prompts, responses, labels):\n    return [LIMIT - x for x in labels]\n")
    found = FunctionReward(f"{file}:score")
    assert (found.name, found(SAMPLES).rewards.tolist()) == ("score", [3, 2, 1])


def test_a_function_is_loaded_from_a_module():
    assert FunctionReward("operator:add").name == "add"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("rewards.py", "expected path/to/file.py:function"),
        ("nowhere.py:score", "nowhere.py is no file"),
        ("no_such_package.rewards:score", "importing no_such_package.rewards raised ModuleNotFoundError"),
        ("{file}:other", "has no function 'other': it has score"),
        ("{file}:LIMIT", "has no function 'LIMIT'"),
        ("{broken}:score", "raised ZeroDivisionError"),
    ],
)
def test_a_function_that_is_not_there_is_told(where, message, tmp_path):
    (tmp_path / "file.py").write_text("LIMIT = 3\n\ndef score(prompts, responses, labels): ...\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match=message):
        FunctionReward(where.format(file=tmp_path / "file.py", broken=tmp_path / "broken.py"))


# -- mixtures ------------------------------------------------------------------------------------------------------


def test_a_mixture_is_the_weighted_mean_and_reports_its_parts():
    found = RewardMixture([FunctionReward(doubled), FunctionReward(with_accuracy)], [3.0, 1.0])(SAMPLES)
    assert found.rewards.tolist() == [0.0, (3 * 2 + 1) / 4, (3 * 4 + 2) / 4]
    assert {name: each.tolist() for name, each in found.metrics.items()} == {
        "doubled": [0, 2, 4],
        "with_accuracy": [0, 1, 2],
        "accuracy": [0, 1, 1],
    }


def test_parts_of_one_name_are_told_apart():
    found = RewardMixture([FunctionReward(with_accuracy)] * 2)(SAMPLES)
    assert list(found.metrics) == ["with_accuracy_1", "accuracy", "with_accuracy_2", "with_accuracy_2/accuracy"]


@pytest.mark.parametrize(
    ("weights", "message"), [([1.0], "1 weights for 2 sources"), ([1.0, -1.0], "expected a sum above 0")]
)
def test_weights_that_do_not_fit_are_told(weights, message):
    with pytest.raises(ConfigError, match=message):
        RewardMixture([FunctionReward(doubled)] * 2, weights)


# -- models --------------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    """The sum of the token ids of each sequence, times a weight."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.weight.weight, weight)
        self.calls = 0

    def forward(self, sequences, attention_mask):
        self.calls += 1
        return self.weight((sequences * attention_mask).sum(1, keepdim=True).float()).squeeze(1)


BACKENDS = [{"strategy": "fake"}, {"fsdp": True}, {"zero_stage": 3}]


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_several_models_score_in_turn_and_ranks_pass_equally_often(backend, offload):
    if "zero_stage" in backend:
        pytest.importorskip("deepspeed")

    def program():
        strategy = get_strategy({"train_batch_size": 2, "micro_rollout_batch_size": 2, **backend})
        models = [strategy.prepare_reward_model(Sum(weight)) for weight in (1.0, 10.0)]
        config = TrainerConfig(offload_reward_models=offload, reward_weights="1,2,1")
        source = reward_source([*models, doubled], strategy, config)
        mine = [[sample(number, number) for number in range(1, 6)], []][strategy.get_rank()]
        found = source(mine)
        if offload:
            with pytest.raises(OffloadStateError):
                strategy.offload_model(models[0])
        dist.destroy_process_group()
        passes = [strategy.unwrap_model(model).calls for model in models]
        return found.rewards.tolist(), {name: each.tolist() for name, each in found.metrics.items()}, passes

    first, second = SimWorld(2, stall_limit=15).run(program)
    plain = [number * (number + 1) for number in range(1, 6)]
    assert first[0] == [(one + 2 * 10 * one + 2 * number) / 4 for number, one in enumerate(plain, 1)]
    assert first[1] == {
        "reward_model_1": plain, "reward_model_2": [10.0 * one for one in plain], "doubled": [2, 4, 6, 8, 10]
    }  # fmt: skip
    assert second == ([], {"reward_model_1": [], "reward_model_2": [], "doubled": []}, [3, 3])
    assert first[2] == [3, 3]


def test_a_model_that_gives_something_else_is_told():
    strategy = get_strategy({"strategy": "fake", "train_batch_size": 1})
    with pytest.raises(ConfigError, match=r"Wide returned \(3, 3\) for 3 sequences"):
        ModelReward(Wide(), strategy, micro_batch_size=4)(SAMPLES)


class Wide(nn.Module):
    def forward(self, sequences, attention_mask):
        return sequences.float()


# -- of settings ---------------------------------------------------------------------------------------------------


def test_rewards_come_from_what_is_given_and_from_settings(tmp_path):
    strategy = get_strategy({"strategy": "fake", "train_batch_size": 1})
    file = tmp_path / "mine.py"
    file.write_text("def score(prompts, responses, labels): return labels\n")
    alone = reward_source(None, strategy, TrainerConfig(reward_function=f"{file}:score"))
    assert (type(alone.source), alone.name) == (FunctionReward, "score")
    config = TrainerConfig(
        reward_function=f"{file}:score", remote_reward_url="http://localhost:1/", reward_weights="1,2,3"
    )
    mixture = reward_source(doubled, strategy, config)
    assert [type(each.source) for each in mixture.sources] == [FunctionReward, FunctionReward, RemoteReward]
    assert mixture.weights == [1, 2, 3]


def test_k24_settings_of_services():
    with socket.create_server(("127.0.0.1", 0)) as listener:  # which never answers
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        strategy = get_strategy({"strategy": "fake", "train_batch_size": 1})
        config = TrainerConfig(remote_reward_url=url, remote_reward_timeout=0.03, remote_reward_attempts=1)
        with pytest.raises(RewardError, match="in 1 of 1 attempts of up to 0.03 s: the last time it did not answer"):
            reward_source(None, strategy, config)(SAMPLES)


def test_no_rewards_and_wrong_ones_are_told():
    strategy = get_strategy({"strategy": "fake", "train_batch_size": 1})
    with pytest.raises(ConfigError, match="there is nothing that gives rewards"):
        reward_source(None, strategy, TrainerConfig())
    with pytest.raises(ConfigError, match="got int as a source of rewards"):
        reward_source([3], strategy, TrainerConfig())
    with pytest.raises(ConfigError, match="1 weights for 2 sources"):
        reward_source([doubled, doubled], strategy, TrainerConfig(reward_weights="1"))
