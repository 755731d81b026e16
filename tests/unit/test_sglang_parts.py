"""The parts of the adapter for SGLang that need no SGLang."""

import asyncio
import dataclasses
import json
import logging
import multiprocessing
import os
import random
import signal
import struct
import sys

import pytest
import torch

from lightrft.errors import ConfigError, EngineStateError, WeightSyncError
from lightrft.strategy.coverage import Coverage
from lightrft.strategy.engine_settings import EngineSettings
from lightrft.strategy.model_files import ModelFiles
from lightrft.strategy.requests import Request
from lightrft.strategy.sampling import SamplingParams
from lightrft.strategy.sglang_utils import generation, sending
from lightrft.strategy.sglang_utils.host import put_back, set_aside
from lightrft.strategy.sglang_utils.launching import library

SHAPES = {"model.embed_tokens.weight": (4, 2), "norm.weight": (2,)}
EMBEDDING, NORM = ("model.embed_tokens.weight", torch.zeros(4, 2)), ("norm.weight", torch.zeros(2))
HEAD = ("lm_head.weight", torch.zeros(4, 2))


def write_weights(file, shapes):
    entries = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes.items()}
    head = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head)


@pytest.mark.parametrize("index", [False, True])
def test_the_files_of_a_model_tell_its_weights(tmp_path, index):
    write_weights(tmp_path / "model-1.safetensors", {"a": [2, 3], "layers.0.rotary_emb.inv_freq": [4]})
    write_weights(tmp_path / "model-2.safetensors", {"b": []})
    if index:
        write_weights(tmp_path / "other.safetensors", {"c": [1]})
        weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = {"vocab_size": 7, "tie_word_embeddings": True, "max_position_embeddings": 9}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": text, "vision_config": {}, "image_token_id": 5}))
    found = ModelFiles.of(str(tmp_path))
    assert found == ModelFiles(
        shapes={"a": (2, 3), "b": ()},
        tied=True,
        vocab_size=7,
        max_positions=9,
        image_token=5,
        sees=True,
        has_tokenizer=False,
    )


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("index", [False, True])
def test_f06_files_of_torch_tell_the_weights_where_there_are_no_others(tmp_path, zipped, index):
    def write(name, weights):
        torch.save(weights, tmp_path / name, _use_new_zipfile_serialization=zipped)

    write("pytorch_model-1.bin", {"a": torch.zeros(2, 3).half(), "layers.0.rotary_emb.inv_freq": torch.zeros(4)})
    write("pytorch_model-2.bin", {"b": torch.tensor(1)})
    write("training_args.bin", {"c": torch.zeros(1)})
    if index:
        write("pytorch_model-old.bin", {"c": torch.zeros(1)})
        weight_map = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text("{}")
    found = ModelFiles.of(str(tmp_path))
    assert (found.shapes, found.whole_numbers) == ({"a": (2, 3), "b": ()}, frozenset({"b"}))
    write_weights(tmp_path / "model.safetensors", {"d": [1]})
    assert ModelFiles.of(str(tmp_path)).shapes == {"d": (1,)}


def test_a_model_that_is_nowhere_is_unknown(tmp_path):
    assert ModelFiles.of(str(tmp_path / "none")) == ModelFiles()
    assert ModelFiles.of(str(tmp_path)) == ModelFiles()


def test_a_tied_output_layer_that_the_checkpoint_lacks_is_a_copy():
    for shapes, copy in ((SHAPES, True), ({**SHAPES, "lm_head.weight": (4, 2)}, False)):
        coverage = Coverage(ModelFiles(shapes=shapes, tied=True))
        assert [coverage.fits(name, tuple(tensor.shape)) for name, tensor in (EMBEDDING, NORM, HEAD)] == [True] * 3
        assert [coverage.is_copy(name) for name, _ in (EMBEDDING, NORM, HEAD)] == [False, False, copy]
        coverage.check()


def test_f06_what_does_not_fit_is_named_before_all_has_come():
    coverage = Coverage(ModelFiles(shapes=SHAPES, tied=False))
    assert coverage.fits(*[NORM[0], tuple(NORM[1].shape)])
    coverage.check(whole=False)
    assert not coverage.fits("lm_head.weight", (4, 2))
    with pytest.raises(WeightSyncError, match="unexpected: lm_head.weight"):
        coverage.check(whole=False)


def test_seeds_follow_from_the_prompt_and_not_from_its_place():
    one, other = Request(prompt_token_ids=(1, 2)), Request(prompt="a")
    params = SamplingParams(n=2, seed=7)
    requests, several = generation.with_seeds([one, other], params)
    assert requests == [one, one, other, other]
    seeds = [each.seed for each in several]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**63 and each.n == 1 for seed, each in zip(seeds, several, strict=True))
    _, swapped = generation.with_seeds([other, one], params)
    assert [each.seed for each in swapped] == seeds[2:] + seeds[:2]
    _, reseeded = generation.with_seeds([one, other], SamplingParams(n=2, seed=8))
    assert not {each.seed for each in reseeded} & set(seeds)
    assert generation.with_seeds([one], SamplingParams(temperature=0, seed=7)) == ([one], SamplingParams(temperature=0))


@pytest.mark.parametrize(
    ("params", "raw", "mode"),
    [
        (SamplingParams(), False, "raw"),
        (SamplingParams(temperature=0), False, "raw"),
        (SamplingParams(top_k=3), False, "raw"),
        (SamplingParams(temperature=0.5), False, "processed"),
        (SamplingParams(temperature=0.5), True, "raw"),
        (SamplingParams(repetition_penalty=1.1), True, "processed"),
        (SamplingParams(logit_bias={3: 1.0}), True, "processed"),
    ],
)
def test_the_log_probs_that_come_back(params, raw, mode):
    assert generation.log_probs_mode(params, raw=raw) == mode


def output(**others):
    meta = {"finish_reason": {"type": "length", "length": 1}, "output_token_logprobs": [(-0.5, 3, None)]}
    return {"output_ids": [3], "meta_info": {**meta, **others}}


def test_what_an_engine_gave_up_or_does_not_tell():
    plain, seeing = Request(prompt_token_ids=(1,)), Request(prompt_token_ids=(1,), images=("a",))
    found = generation.completion_of(plain, output(), log_probs="raw", version=4)
    assert (found.log_probs, found.weight_version, found.finish_reason) == ((-0.5,), 4, "length")
    aborted = output(finish_reason={"type": "abort", "message": "no memory"})
    with pytest.raises(EngineStateError, match="gave a request up: no memory"):
        generation.completion_of(plain, aborted, log_probs=None, version=0)
    with pytest.raises(EngineStateError, match="does not tell the tokens of a prompt"):
        generation.completion_of(seeing, output(), log_probs=None, version=0)


def test_an_update_that_is_refused_does_not_raise_by_itself():
    sending.check((True, "Success"), "an update")
    with pytest.raises(WeightSyncError, match="SGLang refused an update: no session"):
        sending.check((False, "no session"), "an update")


def test_what_a_start_changes_is_put_back(monkeypatch):
    monkeypatch.setenv("KEPT", "1")
    root, policy = logging.getLogger(), asyncio.get_event_loop_policy()
    before = (
        dict(os.environ),
        multiprocessing.get_start_method(allow_none=True),
        signal.getsignal(signal.SIGTERM),
        root.level,
        list(root.handlers),
        sys.excepthook,
        random.getstate(),
    )
    with put_back(), set_aside({"KEPT": None, "NEW": "x"}):
        assert ("KEPT" in os.environ, os.environ["NEW"]) == (False, "x")
        os.environ["KEPT"] = "2"
        os.environ["ADDED"] = "3"
        multiprocessing.set_start_method("forkserver", force=True)
        signal.signal(signal.SIGTERM, lambda *_: None)
        root.setLevel(1)
        root.addHandler(logging.NullHandler())
        root.removeHandler(before[4][0])
        asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())
        sys.excepthook = print
        random.random()
    assert before == (
        dict(os.environ),
        multiprocessing.get_start_method(allow_none=True),
        signal.getsignal(signal.SIGTERM),
        root.level,
        [handler for handler in before[4] if handler in root.handlers],
        sys.excepthook,
        random.getstate(),
    )
    assert asyncio.get_event_loop_policy() is policy
    assert not any(type(handler) is logging.NullHandler for handler in root.handlers)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sglang", None)
    with pytest.raises(ConfigError, match=r'pip install "lightrft\[sglang\]"'):
        library(torch.device("cpu"))


def test_settings_say_where_an_engine_runs():
    from lightrft.strategy.sglang_utils import launching

    settings = EngineSettings(
        model="m",
        dtype="bfloat16",
        tp_size=2,
        memory_share=0.3,
        max_model_len=64,
        max_tokens=8,
        seed=5,
        sleeps=True,
        device=torch.device("cuda", 4),
        group=None,
        options={"log_level": "info"},
    )
    known = {"model_path", "base_gpu_id", "enable_memory_saver", "enable_weights_cpu_backup", "log_level"}
    assert launching._arguments(settings, ModelFiles(), known) == {
        "model_path": "m",
        "base_gpu_id": 4,
        "enable_memory_saver": True,
        "enable_weights_cpu_backup": True,
        "log_level": "info",
    }
    deep = dataclasses.replace(settings, sleep_level=2)
    assert launching._arguments(deep, ModelFiles(), known)["enable_weights_cpu_backup"] is False
    with pytest.raises(ConfigError, match="SGLang has no log_level; it knows model_path"):
        launching._arguments(settings, ModelFiles(), {"model_path"})
