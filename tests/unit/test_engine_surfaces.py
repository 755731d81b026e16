"""The faces of the fake engine have the signatures, fields and defaults that were recorded of the real packages."""

import dataclasses
import importlib
import inspect
import json
from pathlib import Path

import pytest
from engines.record_sglang import REFUSED
from engines.surfaces import faces_surface

from lightrft.errors import ConfigError
from lightrft.sim.engine.faces import EXPORTS, faces
from lightrft.sim.engine.lacking import Refusing

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
    assert {one.name for one in dataclasses.fields(vllm.EngineArgs)} == set(VLLM["arguments"])
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


# -- Every public name of the modules ---------------------------------------------------------------------------------

RECORDED = {
    where: entry
    for library, file in faces_surface.RECORDS.items()
    for where, entry in json.loads(file.read_text()).items()
    if where != "taken over"
}
OURS = {theirs: ours for several in faces_surface.REACHED.values() for ours, theirs in several.items()}

INSIDE = "objects of it are met, and nobody makes them"
ROUTE = "how an answer finds its way between processes"
OBJECT = "an object of vLLM in the place of which there is None"
WHOLE = {
    **{(where, "constructor"): INSIDE for where in OURS},
    ("vllm.config:ModelConfig", "fields"): INSIDE,
    ("vllm.outputs:RequestOutput", "fields"): "the real one is no dataclass",
}
"""Parts of a description that are not compared, and why."""

DIFFERS = {
    **{
        ("vllm.engine.arg_utils:EngineArgs", name): OBJECT
        for name, default in RECORDED["vllm.engine.arg_utils:EngineArgs"]["fields"]
        if str(default).startswith("<")
    },
    **{("sglang.srt.managers.io_struct:FlushCacheReqOutput", name): ROUTE for name in ("rid", "http_worker_ipc")},
    ("vllm.outputs:RequestOutput", "kwargs"): "the real one warns of further arguments and ignores them",
}
"""Parameters and fields of a class that differ, and why."""

UNORDERED = {"sglang.srt.server_args:ServerArgs", "vllm.engine.arg_utils:EngineArgs"}
"""Classes whose arguments are given by name."""

ADDED = {
    ("sglang.srt.sampling.sampling_params:SamplingParams", "ours"): "what the fake engine makes of it",
    ("vllm.sampling_params:SamplingParams", "ours"): "what the fake engine makes of it",
    ("vllm.sampling_params:SamplingParams", "verify"): "the real one takes configurations of vLLM, which calls it",
}
"""Methods that the real ones have not, or otherwise, and why."""

METHODS = {
    "sglang.srt.sampling.sampling_params:SamplingParams": "normalize",
    "sglang.srt.weight_sync.tensor_bucket:FlattenedTensorBucket": "empty",
    "vllm.outputs:RequestOutput": "add",
    "vllm.sampling_params:SamplingParams": "for_sampler_warmup from_optional update_from_generation_config "
    "update_from_tokenizer",
}
"""Methods that are lacking and not refused by name, since they are for engines, not for trainers."""


def face_of(where):
    """What stands for an object of the record."""
    module, _, name = OURS.get(where, where).partition(":")
    return getattr(importlib.import_module(f"lightrft.sim.engine.{module}" if where in OURS else module), name)


def test_every_public_name_is_in_the_record():
    names = {name for module in EXPORTS for name in faces_surface.exported(module)}
    assert {where.partition(":")[2] for where in RECORDED.keys() - OURS.keys()} == names
    assert set(OURS) <= set(RECORDED)


def entries(where, part, listed):
    kept = [each for each in listed if (where, each[0]) not in DIFFERS]
    return sorted(kept) if where in UNORDERED else kept


@pytest.mark.parametrize("where", RECORDED)
def test_a_public_name_is_what_was_recorded(where):
    ours, recorded = json.loads(json.dumps(faces_surface.described(face_of(where)))), RECORDED[where]
    if not isinstance(recorded, dict) or "methods" not in recorded:
        assert ours == recorded
        return
    assert ours["bases"] == recorded["bases"]
    for part in ("constructor", "fields"):
        if (where, part) not in WHOLE and recorded[part] is not None:
            assert entries(where, part, ours[part]) == entries(where, part, recorded[part])
    alike = [name for name in ours["methods"] if (where, name) not in ADDED]
    assert {name: ours["methods"][name] for name in alike} == {name: recorded["methods"].get(name) for name in alike}
    lacking = recorded["methods"].keys() - ours["methods"].keys()
    assert issubclass(face_of(where), Refusing) or lacking == set(METHODS.get(where, "").split())


@pytest.mark.parametrize("module", EXPORTS)
def test_a_module_has_its_names_and_refuses_others(module):
    made = importlib.import_module(module)
    inside = {each.partition(".")[0] for name in EXPORTS if (each := name.removeprefix(f"{module}.")) != name}
    special = {"__version__"}
    found = {name for name in vars(made) if not name.startswith("__") or name in special}
    assert found - inside == set(faces_surface.exported(module))
    engine = {"vllm": "vLLM", "sglang": "SGLang"}[module.partition(".")[0]]
    assert not hasattr(made, "PoolingParams")
    refusal = rf"the fake {engine} engine has no {module}\.PoolingParams: .*engines=False"
    with pytest.raises(AttributeError, match=refusal):
        made.PoolingParams  # noqa: B018 - there is none
    with pytest.raises(ImportError, match=refusal):
        exec(f"from {module} import PoolingParams")
    with pytest.raises(ConfigError):
        importlib.import_module(f"{module}.lora")


@pytest.mark.parametrize("library", faces_surface.RECORDS)
def test_a_module_takes_over_what_the_real_one_does(library):
    recorded = json.loads(faces_surface.RECORDS[library].read_text())
    modules = [module for module in EXPORTS if module.partition(".")[0] == library]
    names = {f"{module}:{name}" for module in modules for name in faces_surface.exported(module)}
    assert names - recorded.keys() == set(recorded["taken over"])


def test_a_module_inside_another_needs_no_import_of_its_own():
    vllm = importlib.import_module("vllm")
    assert vllm.logprobs.Logprob is importlib.import_module("vllm.logprobs").Logprob


@pytest.mark.parametrize("reached", ["", "llm_engine", "llm_engine.engine_core", "model_config"])
def test_what_objects_of_vllm_lack_is_named(reached):
    made = importlib.import_module("vllm").LLM("any")
    for step in filter(None, reached.split(".")):
        made = getattr(made, step)
    assert not hasattr(made, "add_request")
    with pytest.raises(ConfigError, match=rf"the fake vLLM engine has no {type(made).__name__}\.add_request: .*"):
        made.add_request  # noqa: B018 - there is none


@pytest.mark.parametrize(
    "name", ["async_generate", "get_server_info", "get_weights_by_name", "update_weights_from_disk"]
)
def test_what_the_engine_of_sglang_lacks_is_named(name):
    engine = importlib.import_module("sglang").Engine(model_path="any", skip_tokenizer_init=True)
    with pytest.raises(ConfigError, match=rf"the fake SGLang engine has no Engine\.{name}: leave it out"):
        getattr(engine, name)
