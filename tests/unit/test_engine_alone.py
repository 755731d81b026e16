"""FakeStrategy without a world starts fake engines, whose packages are to be imported during their calls alone."""

import importlib
import sys
import types

import pytest
import torch
from engines import on_cpu

from lightrft.errors import ConfigError, StaleWeightsError
from lightrft.models.tiny import tiny_text_model
from lightrft.sim import SimWorld
from lightrft.sim.engine import alone
from lightrft.strategy import FakeStrategy, get_strategy, is_engine
from lightrft.strategy.engine import ENGINE_TYPES, RolloutEngine
from lightrft.strategy.engine_calls import EngineCalls
from lightrft.strategy.fsdp.fsdpv2 import FSDPV2Strategy

transformers = pytest.importorskip("transformers")

BOTH = pytest.mark.parametrize("engine_type", ENGINE_TYPES)
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "logprobs": 0}
PROMPTS = [[3, 4, 5], [6]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    tiny_text_model(path)
    return path


def settings(folder, **more):
    return {"strategy": "fake", "pretrain": folder, "prompt_max_len": 16, "generate_max_len": 16, **more}


def tokens(strategy):
    return [one.output_token_ids for one in strategy.gather_and_generate(GREEDY, all_prompt_token_ids=PROMPTS)]


def iteration(folder, engine_type):
    """Completions before and after a step."""
    strategy = get_strategy(settings(folder, train_batch_size=1))
    actor = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    actor, optimizer, _ = strategy.prepare((actor, strategy.create_optimizer(actor, lr=1e-2), None))
    strategy.setup_inference_engine(engine_type=engine_type)
    assert is_engine(strategy.inference_engine)
    before = tokens(strategy)
    assert str(strategy.inference_engine_status) == "asleep"
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    strategy.backward(actor(input_ids=ids, labels=ids).loss, actor, optimizer)
    strategy.optimizer_step(optimizer, actor, None)
    strategy.update_engine_weights(actor)
    assert strategy.inference_engine.weight_version == 1
    after = tokens(strategy)
    strategy.wakeup_inference_engine()
    strategy.inference_engine.sleep(level=2)
    with pytest.raises(StaleWeightsError):
        tokens(strategy)
    strategy.inference_engine.shutdown()
    assert str(strategy.inference_engine_status) == "dead"
    return before, after


def greedy(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = [
        model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=6,
            do_sample=False,
            eos_token_id=None,
        )
        for prompt in PROMPTS
    ]
    return [tuple(one[0, len(prompt) :].tolist()) for one, prompt in zip(found, PROMPTS, strict=True)]


@BOTH
def test_an_iteration_without_a_world_is_that_of_one_in_it(engine_type, folder):
    before, after = iteration(folder, engine_type)
    assert before == greedy(folder) != after
    assert engine_type not in sys.modules

    def program():
        found = iteration(folder, engine_type)
        torch.distributed.destroy_process_group()
        return found

    assert SimWorld(1).run(program) == [(before, after)]


def test_nothing_of_the_contract_of_engines_is_left_to_its_defaults():
    public = {name for name in vars(RolloutEngine) if not name.startswith("_")}
    assert public <= vars(alone._Alone).keys()


@BOTH
def test_an_installed_package_is_shadowed_during_the_calls_alone(engine_type, folder, monkeypatch):
    installed = types.ModuleType(engine_type)
    monkeypatch.setitem(sys.modules, engine_type, installed)
    finders = list(sys.meta_path)
    strategy = get_strategy(settings(folder))
    strategy.setup_inference_engine(engine_type=engine_type)
    for call in (lambda: tokens(strategy), strategy.inference_engine.shutdown):
        assert importlib.import_module(engine_type) is installed
        assert sys.meta_path == finders
        call()
    assert importlib.import_module(engine_type) is installed
    assert not [name for name in sys.modules if name.startswith(f"{engine_type}.")]


@BOTH
def test_in_hash_mode_it_needs_no_model(engine_type):
    strategy = FakeStrategy(args=settings("any/name"), engines="hash")
    strategy.setup_inference_engine(engine_type=engine_type)
    strategy.inference_engine.update_weights([[("w", torch.ones(3))]], 1)
    found = tokens(strategy)
    assert [len(one) for one in found] == [6, 6]
    strategy.wakeup_inference_engine()
    strategy.inference_engine.update_weights([[("w", torch.zeros(3))]], 2)
    strategy.inference_engine.reset_caches()
    assert tokens(strategy) != found


@BOTH
@pytest.mark.parametrize("engines", ["hash", "model"])
def test_a_context_longer_than_that_of_the_model_is_refused(engine_type, engines, folder):
    strategy = FakeStrategy(args=settings(folder, prompt_max_len=200, generate_max_len=57), engines=engines)
    message = rf"{engine_type} refuses .* \(prompt_max_len \+ generate_max_len is 257, .* for 256 tokens: lower one"
    with pytest.raises(ConfigError, match=f"(?i){message}"):
        strategy.setup_inference_engine(engine_type=engine_type)
    FakeStrategy(
        args=settings(folder, prompt_max_len=200, generate_max_len=56), engines=engines
    ).setup_inference_engine(engine_type=engine_type)


def test_a_text_that_leaves_sglang_no_room_for_what_is_asked_is_refused(folder):
    strategy = get_strategy(settings(folder))
    strategy.setup_inference_engine(engine_type="sglang")
    with pytest.raises(ConfigError, match="SGLang refuses a request: a prompt of 30 tokens and max_new_tokens=16"):
        strategy.inference_engine.generate([{"prompt": "a" * 30}], {"max_tokens": 16})
    assert strategy.inference_engine.generate([{"prompt": "a" * 16}], {"max_tokens": 16})


def test_the_installed_package_is_started_where_it_is_asked_for(folder):
    with pytest.raises(ConfigError, match="needs the package vllm, which is not installed"):
        FakeStrategy(args=settings(folder), engines=False).setup_inference_engine(engine_type="vllm")
    with pytest.raises(ConfigError, match="engines='real' is unknown: expected False, or one of model, hash"):
        FakeStrategy(args=settings(folder), engines="real")


def test_other_strategies_start_the_installed_package(folder):
    assert FSDPV2Strategy._start_engine is EngineCalls._start_engine is not FakeStrategy._start_engine
    with pytest.raises(ConfigError, match="needs the package vllm, which is not installed"):
        EngineCalls._start_engine(None, "vllm", on_cpu.settings(folder))
