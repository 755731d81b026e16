"""Engines of vLLM that start and end in the process of a trainer, and what they leave of it."""

import dataclasses
import gc
import multiprocessing
import os
import random
import sys
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import on_cpu

from lightrft.errors import ConfigError, EngineStateError
from lightrft.models import tiny
from lightrft.strategy import vllm_utils, weight_sync
from lightrft.strategy.engine import EngineStatus

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::lightrft")]

PROMPT = [{"prompt_token_ids": [9, 40, 17]}]
GREEDY = {"temperature": 0, "logprobs": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return on_cpu.save(tiny.text_model(), tmp_path_factory.mktemp("model"), tiny.tokenizer())


@pytest.fixture
def settings(folder):
    return on_cpu.settings(folder, max_model_len=96, max_tokens=7, seed=3, options={"kv_cache_memory_bytes": 32 << 20})


def changed(settings, **options):
    return dataclasses.replace(settings, options={**settings.options, **options})


@pytest.fixture
def group(tmp_path):
    """The default group of a trainer that is alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def process():
    """What is the same before and after everything that an engine does."""
    return {
        "environ": dict(os.environ),
        "torch": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "set_num_threads": torch.set_num_threads,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": torch.is_grad_enabled(),
        "group": dist.group.WORLD,
        "destroy": dist.destroy_process_group,
        "start method": multiprocessing.get_start_method(allow_none=True),
        "excepthook": sys.excepthook,
        "frozen": gc.get_freeze_count(),
        "directory": os.getcwd(),
    }


def assert_the_same(before):
    after = process()
    assert {name: after[name] for name in before if after[name] != before[name]} == {}


def everything(engine):
    engine.generate(PROMPT * 2, {"n": 2})
    engine.sleep()
    engine.wake_up()
    weight_sync.send(engine, tiny.text_model().named_parameters(), bucket_bytes=1000)


def test_a_process_without_a_group_stays_as_it_was(settings):
    before = process()
    engine = vllm_utils.start(settings)
    assert_the_same(before)
    everything(engine)
    assert_the_same(before)
    gone = weakref.ref(engine._llm)
    engine.shutdown()
    engine.shutdown()
    assert_the_same(before)
    assert gone() is None, "its memory is free"
    assert engine.status is EngineStatus.DEAD
    with pytest.raises(EngineStateError, match="was shut down"):
        engine.generate(PROMPT, GREEDY)


def test_a_trainer_may_make_its_group_beside_a_living_engine(settings, request):
    engine = vllm_utils.start(settings)
    group = request.getfixturevalue("group")
    first = engine.generate(PROMPT, GREEDY)
    assert dist.group.WORLD is group
    engine.shutdown()
    assert_works(group)
    again = vllm_utils.start(dataclasses.replace(settings, group=group))
    assert again.generate(PROMPT, GREEDY) == first
    again.shutdown()
    assert_works(group)


def assert_works(group):
    assert dist.group.WORLD is group
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one.item() == 1


def test_the_group_of_the_trainer_outlives_an_engine_that_was_dropped(settings, group):
    before = process()
    engine = vllm_utils.start(dataclasses.replace(settings, group=group))
    assert_the_same(before)
    gone = weakref.ref(engine._llm)
    del engine
    gc.collect()
    assert gone() is None
    assert_works(group)
    assert_the_same(before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/model"}, "vLLM refuses the settings: .*no/such/model"),
        ({"max_model_len": 10_000}, r"(?s)vLLM refuses the settings: .*max_model_len.*for 256 tokens: lower one"),
        ({"options": {"kv_cache_megabytes": 1}}, "vLLM refuses the settings: .*kv_cache_megabytes"),
        ({"options": {"logprobs_mode": "raw_logits"}}, "logprobs_mode='raw_logits': expected 'processed_logprobs' or"),
        ({"tp_size": 2}, "engine_tp_size=2, but 1 ranks share the engine"),
    ],
)
def test_settings_that_cannot_work_are_refused_and_leave_the_process_alone(settings, changes, message):
    before = process()
    with pytest.raises(ConfigError, match=message):
        vllm_utils.start(dataclasses.replace(settings, **changes))
    assert_the_same(before)


def test_an_engine_with_tokenizer_takes_and_gives_text_and_raw_log_probs_if_asked(settings):
    model, letters = tiny.text_model(), tiny.tokenizer()
    engine = vllm_utils.start(changed(settings, logprobs_mode="raw_logprobs"))
    (found,) = engine.generate([{"prompt": "hello"}], GREEDY)
    assert found.prompt_token_ids == tuple(letters.encode("hello"))
    assert found.text == letters.decode(found.output_token_ids, skip_special_tokens=True)
    stop = found.text[2]
    (short,) = engine.generate([{"prompt": "hello"}], GREEDY | {"stop": stop, "include_stop_str_in_output": True})
    assert short.finish_reason == "stop"
    assert short.text == found.text[: found.text.index(stop) + 1]
    (hot,) = engine.generate([{"prompt": "hello"}], {"temperature": 2.0, "logprobs": True, "ignore_eos": True})
    ids = torch.tensor([hot.prompt_token_ids + hot.output_token_ids])
    with torch.no_grad():
        raw = model(ids).logits[0, 4:-1].log_softmax(-1)
    raw = raw.gather(1, torch.tensor(hot.output_token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(hot.log_probs), raw, atol=1e-4, rtol=0)
    assert hot.log_probs_mode == "raw"
    engine.shutdown()


def test_an_output_layer_of_its_own_is_updated_and_may_not_be_missing(settings):
    engine = vllm_utils.start(settings)
    model = tiny.text_model(seed=1)
    weight_sync.send(engine, model.named_parameters(), bucket_bytes=1000, poison=True)
    (found,) = engine.generate(PROMPT, GREEDY)
    ids = torch.tensor([found.prompt_token_ids + found.output_token_ids])
    with torch.no_grad():
        expected = model(ids).logits[0, 2:-1].log_softmax(-1).gather(1, torch.tensor(found.output_token_ids)[:, None])
    torch.testing.assert_close(torch.tensor(found.log_probs), expected[:, 0], atol=1e-4, rtol=0)
    kept = [(name, weight) for name, weight in model.named_parameters() if name != "lm_head.weight"]
    with pytest.raises(Exception, match="missing: lm_head.weight"):
        weight_sync.send(engine, kept, bucket_bytes=1000)
    engine.shutdown()


def test_an_engine_that_was_to_stay_awake_does(settings):
    engine = vllm_utils.start(dataclasses.replace(settings, sleeps=False))
    with pytest.raises(ConfigError, match="enable_engine_sleep off"):
        engine.sleep()
    assert engine.status is EngineStatus.AWAKE
    assert len(engine.generate(PROMPT, GREEDY)) == 1
    engine.shutdown()


def test_what_is_drawn_does_not_depend_on_how_many_prompts_are_read_at_once(settings):
    prompts = [{"prompt_token_ids": [*range(6, 76), last]} for last in (6, 7, 8)]
    found = []
    for limits in ({}, {"max_num_batched_tokens": 100, "max_num_seqs": 8}):
        engine = vllm_utils.start(changed(settings, enable_prefix_caching=False, **limits))
        drawn = engine.generate(prompts, {"temperature": 1.0, "seed": 5, "max_tokens": 12})
        found.append([one.output_token_ids for one in drawn])
        engine.shutdown()
    assert found[0] == found[1]
