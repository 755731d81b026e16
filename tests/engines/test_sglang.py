"""The adapter for SGLang, on the real one, on a CPU: one engine for all of these tests."""

import asyncio
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch

from lightrft.errors import ConfigError
from lightrft.models import tiny
from lightrft.strategy import engine as engines
from lightrft.strategy.requests import Request
from lightrft.strategy.sglang_utils import start

sys.path.insert(0, str(Path(__file__).parent))  # for the processes of the engine too

import on_cpu
import record_sglang
from engine_checks import CHECKS, PROMPTS, Subject, greedy
from on_cpu import LENGTH, settings

pytestmark = pytest.mark.filterwarnings("default")  # those of SGLang, and what its processes leave open


def process_state():
    """What an engine may not change in the process that starts it."""
    return {
        "environment": dict(os.environ),
        "start method": multiprocessing.get_start_method(allow_none=True),
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "event loops": asyncio.get_event_loop_policy(),
        "logging": (logging.getLogger().level, list(logging.getLogger().handlers)),
        "hook": sys.excepthook,
        "random": (random.getstate(), torch.get_rng_state().tolist()),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    return {}


@pytest.fixture(scope="module")
def subject(tmp_path_factory, changed):
    models = tiny.text_model(seed=0), tiny.text_model(seed=1)
    folder = on_cpu.save(models[0], tmp_path_factory.mktemp("model"), tiny.tokenizer())
    before = process_state()
    engine = engines.start("sglang", settings(folder))
    after = process_state()
    changed.update({name: (before[name], after[name]) for name in before if before[name] != after[name]})
    changed["quit"] = signal.getsignal(signal.SIGQUIT)
    yield Subject(engine=engine, models=models, max_model_len=LENGTH, vocabulary=tiny.VOCABULARY, end=tiny.EOS)
    engine.shutdown()
    assert multiprocessing.active_children() == []
    assert engine.status is engines.EngineStatus.DEAD
    assert signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL


def test_a_new_engine_holds_what_is_on_disk(subject):
    assert (subject.engine.status, subject.engine.weight_version) == (engines.EngineStatus.AWAKE, 0)
    assert subject.holds(subject.models[0])


def test_its_start_leaves_the_process_as_it_was(subject, changed):
    assert callable(changed.pop("quit"))
    assert changed == {}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(subject, check):
    subject.start_over()
    check(subject)


def test_text_and_tokens_in_one_call(subject):
    subject.start_over()
    letters = "".join(tiny.LETTERS[token - len(tiny.SPECIAL)] for token in PROMPTS[0])
    requests = [Request(prompt=letters), Request(prompt_token_ids=PROMPTS[1]), Request(prompt=letters)]
    found = subject.engine.generate(requests, {"temperature": 0})
    assert [one.prompt_token_ids for one in found] == [PROMPTS[0], PROMPTS[1], PROMPTS[0]]
    assert [list(one.output_token_ids) for one in found] == [
        greedy(subject.models[0], prompt) for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[0])
    ]
    assert found[0].text == tiny.tokenizer().decode(found[0].output_token_ids, skip_special_tokens=True)


def test_what_its_sampling_parameters_mean(subject):
    subject.start_over()
    (free,) = subject.generate(PROMPTS[:1], ignore_eos=True)
    text = free.text
    (stopped,) = subject.generate(PROMPTS[:1], ignore_eos=True, stop=[text[3]])
    assert stopped.finish_reason == "stop"
    assert stopped.output_token_ids == free.output_token_ids[: len(stopped.output_token_ids)]
    (pushed,) = subject.generate(PROMPTS[:1], logit_bias={77: 100.0}, logprobs=0)
    assert set(pushed.output_token_ids) == {77}
    assert pushed.log_probs_mode == "processed"  # the bias is in them
    assert {len(one.output_token_ids) for one in subject.generate(max_tokens=12, min_tokens=12)} == {12}
    (likeliest,) = subject.generate(PROMPTS[:1], temperature=1.0, top_k=1, ignore_eos=True)
    assert likeliest.output_token_ids == free.output_token_ids


def test_tokens_that_stop_and_an_end_that_is_ignored(subject):
    with pytest.raises(ConfigError, match="ignore_eos makes SGLang pass over stop_token_ids"):
        subject.generate(ignore_eos=True, stop_token_ids=[7])


def test_a_seed_needs_an_engine_that_draws_by_it(subject):
    with pytest.raises(ConfigError, match="engine_options={'enable_deterministic_inference': True}"):
        subject.generate(temperature=1.0, seed=3)
    assert subject.generate(PROMPTS[:1], seed=3) == subject.generate(PROMPTS[:1])  # the likeliest needs none


def test_an_unknown_option_is_named(subject):
    with pytest.raises(ConfigError, match="SGLang has no tensor_parallel_size; it knows .*tp_size"):
        start(settings(subject.engine._settings.model, options={"tensor_parallel_size": 2}))


def test_more_prompts_than_fit_at_a_time(subject):
    subject.start_over()
    prompts = [(10 + count % 100, 10 + count // 100, *range(20, 50)) for count in range(150)]
    found = subject.generate(prompts, max_tokens=30)
    assert [one.prompt_token_ids for one in found] == prompts
    for place in (0, 77, 149):
        assert list(found[place].output_token_ids) == greedy(subject.models[0], prompts[place], 30)


def test_the_record_is_of_what_is_installed(subject):
    subject.start_over()
    record = json.loads(record_sglang.RECORD.read_text())
    found = {**record_sglang.declared(), "returned": record_sglang.returned(subject.engine._launched.engine)}
    assert json.loads(json.dumps(found)) == record
