"""The faces of the fake engine have the signatures, fields and defaults that were recorded of the real packages."""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest
from engines.record_sglang import REFUSED

from lightrft.sim.engine.faces import faces

SURFACES = Path(__file__).parents[1] / "engines" / "surfaces"
VLLM = json.loads((SURFACES / "vllm-0.32.json").read_text())
SGLANG = json.loads((SURFACES / "sglang-0.5.23.json").read_text())

VLLM_LACKS = {"vllm.LLM.chat": "conversations"}
SGLANG_LACKS = {"GenerateReqInput": "requests behind Engine.generate"}


@pytest.fixture(scope="module", autouse=True)
def installed():
    with faces("hash"):
        yield


def found(name):
    """What ``name`` of the record is in the face."""
    first, *path = name.split(".")
    vllm = importlib.import_module("vllm")
    if first == "vllm":
        made = vllm if path != ["Logprob"] else importlib.import_module("vllm.logprobs")
    elif first == "llm":
        made = vllm.LLM("any")
    else:
        (made,) = vllm.LLM("any").collective_rpc(lambda worker: worker)
    for step in path:
        made = getattr(made, step)
    return made


def parameters(function):
    """As the record has them, without ``self`` and without further keyword arguments, which are ignored there."""
    return [
        [one.name, one.kind.name, None if one.default is inspect.Parameter.empty else repr(one.default)]
        for one in inspect.signature(function).parameters.values()
        if one.name != "self" and one.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def test_the_versions_are_those_of_the_records():
    assert importlib.import_module("vllm").__version__ == VLLM["version"]
    assert importlib.import_module("sglang").__version__ == SGLANG["version"]


@pytest.mark.parametrize("name", sorted(VLLM["calls"].keys() - VLLM_LACKS.keys()))
def test_calls_of_vllm_have_the_same_arguments(name):
    recorded = [one for one in VLLM["calls"][name] if one[1] != "VAR_KEYWORD"]
    assert parameters(found(name)) == recorded


@pytest.mark.parametrize("name", VLLM_LACKS)
def test_what_the_face_of_vllm_lacks_is_declared(name):
    with pytest.raises(AttributeError):
        found(name)


@pytest.mark.parametrize("name", VLLM["fields"])
def test_objects_of_vllm_have_the_same_fields(name):
    def default(one):
        if one.default is not dataclasses.MISSING:
            return repr(one.default)
        return None if one.default_factory is dataclasses.MISSING else repr(one.default_factory())

    assert [[one.name, default(one)] for one in dataclasses.fields(found(name))] == VLLM["fields"][name]


def test_arguments_and_errors_of_vllm_are_there():
    vllm = importlib.import_module("vllm")
    assert {one.name for one in dataclasses.fields(vllm.EngineArgs)} <= set(VLLM["arguments"])
    error = importlib.import_module("vllm.exceptions").VLLMValidationError
    assert [cls.__name__ for cls in error.__mro__] == VLLM["errors"]


def signature(function):
    return [
        [one.name, "<required>" if one.default is inspect.Parameter.empty else repr(one.default)]
        for one in inspect.signature(function).parameters.values()
    ]


@pytest.mark.parametrize("name", SGLANG["Engine"])
def test_calls_of_sglang_have_the_same_arguments(name):
    engine = importlib.import_module("sglang").Engine
    assert signature(inspect.getattr_static(engine, name)) == SGLANG["Engine"][name]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("SamplingParams", "sglang.srt.sampling.sampling_params"),
        ("ServerArgs", "sglang.srt.server_args"),
        ("FlattenedTensorBucket", "sglang.srt.weight_sync.tensor_bucket"),
        ("FlattenedTensorBucket.get_flattened_tensor", "sglang.srt.weight_sync.tensor_bucket"),
        ("FlattenedTensorBucket.get_metadata", "sglang.srt.weight_sync.tensor_bucket"),
        ("MultiprocessingSerializer.serialize", "sglang.srt.utils"),
    ],
)
def test_objects_of_sglang_have_the_same_arguments(name, place):
    made = importlib.import_module(place)
    for step in name.split("."):
        made = getattr(made, step)
    ours, recorded = dict(signature(made)), dict(SGLANG[name])
    if name == "ServerArgs":  # the record has those that are used
        ours = {each: ours.get(each) for each in recorded}
    assert ours == recorded


def test_nothing_of_the_record_of_sglang_is_passed_over():
    places = {name for name in SGLANG if name.partition(".")[0] not in ("Engine", *SGLANG_LACKS)}
    assert places - {"engine_module_has", "returned", "version"} == {
        "FlattenedTensorBucket", "FlattenedTensorBucket.get_flattened_tensor", "FlattenedTensorBucket.get_metadata",
        "MultiprocessingSerializer.serialize", "SamplingParams", "ServerArgs",
    }  # fmt: skip


def kinds(several):
    return [type(several).__name__, *(type(one).__name__ for one in several)]


def test_sglang_returns_what_was_recorded():
    sglang = importlib.import_module("sglang")
    returned = SGLANG["returned"]
    engine = sglang.Engine(model_path="any", skip_tokenizer_init=True, context_length=72)
    assert engine.begin_weight_update()[0] is returned["begin_weight_update"][0]
    assert engine.begin_weight_update()[0] is returned["begin_weight_update twice"][0]
    serializer = importlib.import_module("sglang.srt.utils").MultiprocessingSerializer
    bucket_of = importlib.import_module("sglang.srt.weight_sync.tensor_bucket").FlattenedTensorBucket
    torch = importlib.import_module("torch")
    bucket = bucket_of(named_tensors=[("w", torch.ones(2))])
    payload = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    engine.update_weights_from_tensor([serializer.serialize(payload)], load_format="flattened_bucket")
    assert engine.end_weight_update()[0] is returned["end_weight_update"][0]
    assert engine.end_weight_update()[0] is returned["end_weight_update twice"][0]
    outside = engine.update_weights_from_tensor([])
    assert [type(outside).__name__, *(type(one).__name__ for one in outside)] == returned[
        "update_weights_from_tensor outside"
    ]
    assert engine.flush_cache().success is returned["flush_cache.success"]
    params = {"n": 2, "max_new_tokens": 2, "ignore_eos": True}
    outputs = engine.generate(input_ids=[[3], [4]], sampling_params=params, return_logprob=True)
    assert len(outputs) == returned["generate.count"]
    assert outputs[0]["meta_info"]["finish_reason"] == returned["generate.finish_reason.length"]
    recorded = returned["generate"][1]
    assert outputs[0].keys() - {"text"} <= recorded.keys()
    for name, value in outputs[0]["meta_info"].items():
        kind = recorded["meta_info"][name]
        assert type(value).__name__ == (
            kind if isinstance(kind, str) else "dict" if isinstance(kind, dict) else kind[0]
        )
    (log_prob, *_) = outputs[0]["meta_info"]["output_token_logprobs"]
    assert [type(log_prob).__name__, *(type(one).__name__ for one in log_prob)] == recorded["meta_info"][
        "output_token_logprobs"
    ][1]
    for name, asked in REFUSED.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the record says which
            engine.generate(**asked)
        assert (name, type(caught.value).__name__) == (name, returned[f"generate: {name}"])
    engine.flush_cache()
    assert engine.release_memory_occupation() is returned["release_memory_occupation"]
    assert engine.resume_memory_occupation() is returned["resume_memory_occupation"]
