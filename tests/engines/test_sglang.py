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
from lightrft.sim import ProcessWorld
from lightrft.sim.contracts import engine as engine_contract
from lightrft.sim.contracts import weight_sync as weight_sync_contract
from lightrft.strategy import engine as engines
from lightrft.strategy.sglang_utils import start

sys.path.insert(0, str(Path(__file__).parent))  # for the processes of the engine too

import on_cpu
import record_sglang
from engines.surfaces import faces_surface
from on_cpu import settings

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


class World:
    """Two processes, which end with the run."""

    def __init__(self, size):
        self.size = size

    def run(self, program, *args):
        with ProcessWorld(self.size, limit=280) as world:
            return world.run(program, *args)


def start_shared(folder, here):
    def on_a_rank(group):
        sys.path.insert(0, here)
        import on_cpu

        from lightrft.strategy.sglang_utils import start

        return start(on_cpu.settings(folder, tp_size=2, group=group))

    return on_a_rank


def native(params):
    from sglang.srt.sampling.sampling_params import SamplingParams

    return SamplingParams(**params.to_sglang(SamplingParams))


@pytest.fixture(scope="module")
def subject(tmp_path_factory, changed):
    models = on_cpu.pair(tie_word_embeddings=True)
    folder = on_cpu.save(models[0], tmp_path_factory.mktemp("model"), tiny.tokenizer())

    def started(index):
        assert index == 0
        before = process_state()
        engine = engines.start("sglang", settings(folder))
        after = process_state()
        changed.update({name: (before[name], after[name]) for name in before if before[name] != after[name]})
        changed["quit"] = signal.getsignal(signal.SIGQUIT)
        return on_cpu.counting(engine)

    made = on_cpu.subject(
        "SGLang, on a CPU",
        started,
        models,
        native=native,
        world=World,
        start_shared=start_shared(folder, str(Path(__file__).parent)),
    )
    yield made
    engine = made.engine
    made.close()
    assert multiprocessing.active_children() == []
    assert engine.status is engines.EngineStatus.DEAD
    assert signal.getsignal(signal.SIGQUIT) == signal.SIG_DFL


def test_its_start_leaves_the_process_as_it_was(subject, changed):
    subject.fresh()
    assert callable(changed.pop("quit"))
    assert changed == {}


@pytest.mark.parametrize("check", [*engine_contract.CHECKS, *weight_sync_contract.CHECKS], ids=str)
def test_sglang_keeps_the_contract(subject, check):
    check(subject)


def test_what_its_sampling_parameters_mean(subject):
    subject.fresh()
    (free,) = subject.generate(subject.prompts[:1], ignore_eos=True)
    text = free.text
    (stopped,) = subject.generate(subject.prompts[:1], ignore_eos=True, stop=[text[3]])
    assert stopped.finish_reason == "stop"
    assert stopped.output_token_ids == free.output_token_ids[: len(stopped.output_token_ids)]
    (pushed,) = subject.generate(subject.prompts[:1], logit_bias={77: 100.0}, logprobs=0)
    assert set(pushed.output_token_ids) == {77}
    assert pushed.log_probs_mode == "processed"  # the bias is in them
    assert {len(one.output_token_ids) for one in subject.generate(max_tokens=12, min_tokens=12)} == {12}
    (likeliest,) = subject.generate(subject.prompts[:1], temperature=1.0, top_k=1, ignore_eos=True)
    assert likeliest.output_token_ids == free.output_token_ids


def test_tokens_that_stop_and_an_end_that_is_ignored(subject):
    with pytest.raises(ConfigError, match="ignore_eos makes SGLang pass over stop_token_ids"):
        subject.generate(ignore_eos=True, stop_token_ids=[7])


def test_a_seed_needs_an_engine_that_draws_by_it(subject):
    with pytest.raises(ConfigError, match="engine_options={'enable_deterministic_inference': True}"):
        subject.generate(temperature=1.0, seed=3)
    assert subject.generate(subject.prompts[:1], seed=3) == subject.generate(
        subject.prompts[:1]
    )  # the likeliest needs none


def test_an_unknown_option_is_named(subject):
    with pytest.raises(ConfigError, match="SGLang has no tensor_parallel_size; it knows .*tp_size"):
        start(settings(subject.engine._settings.model, options={"tensor_parallel_size": 2}))


def test_more_prompts_than_fit_at_a_time(subject):
    subject.fresh()
    prompts = [(10 + count % 100, 10 + count // 100, *range(20, 50)) for count in range(150)]
    found = subject.generate(prompts, max_tokens=30)
    assert [one.prompt_token_ids for one in found] == prompts
    for place in (0, 77, 149):
        best = subject.best(0, prompts[place], 30)
        ended = [*best, tiny.EOS].index(tiny.EOS) + 1
        assert list(found[place].output_token_ids) == best[:ended]


def test_the_record_is_of_what_is_installed(subject):
    subject.fresh()
    record = json.loads(record_sglang.RECORD.read_text())
    found = {**record_sglang.declared(), "returned": record_sglang.returned(subject.engine._launched.engine)}
    assert json.loads(json.dumps(found)) == record


def test_the_record_of_all_public_names_is_that_of_the_installed_package():
    recorded = json.loads(faces_surface.RECORDS["sglang"].read_text(encoding="utf-8"))
    installed = json.loads(json.dumps(faces_surface.surface("sglang")))
    assert installed.keys() == recorded.keys()
    for where, entry in installed.items():
        assert entry == recorded[where], f"{where} has changed: write the record anew"
