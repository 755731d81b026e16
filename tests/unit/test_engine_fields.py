"""Every argument and field of both engines' records is honoured by the fake engine, idle by its nature, or refused."""

import collections
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engines import on_cpu

from lightrft.errors import ConfigError
from lightrft.models import tiny
from lightrft.sim.engine.faces import faces
from lightrft.sim.engine.sglang_face import engine as sglang_engine
from lightrft.sim.engine.sglang_face import sampling_params as sglang_params
from lightrft.sim.engine.sglang_face import server_args
from lightrft.sim.engine.vllm_face import arguments
from lightrft.sim.engine.vllm_face import sampling_params as vllm_params

pytest.importorskip("transformers")

SURFACES = Path(__file__).parents[1] / "engines" / "surfaces"
VLLM = json.loads((SURFACES / "vllm-0.32.json").read_text())
SGLANG = json.loads((SURFACES / "sglang-0.5.23.json").read_text())
WHAT_TO_DO = r"SimWorld\(engines=False\) or `lightrft sim --engines installed`"


def names(entries):
    return {name for name, *_ in entries}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return on_cpu.save(tiny.text_model(), tmp_path_factory.mktemp("model"), tiny.tokenizer())


@pytest.fixture(scope="module")
def installed():
    with faces("model"):
        yield importlib.import_module("vllm"), importlib.import_module("sglang")


@pytest.fixture(scope="module")
def vllm(installed):
    return installed[0]


@pytest.fixture(scope="module")
def sglang(installed):
    return installed[1]


@pytest.fixture(scope="module")
def llm(vllm, folder):
    return vllm.LLM(folder)


@pytest.fixture(scope="module")
def engine(sglang, folder):
    return sglang.Engine(model_path=folder, random_seed=1, enable_deterministic_inference=True)


PROMPT = [20, 21, 22]
GREEDY = {"temperature": 0.0}


# -- Sampling parameters of vLLM --------------------------------------------------------------------------------------

VLLM_HONOURED = {
    "n": ({}, 2),
    "presence_penalty": (GREEDY, 2.0),
    "frequency_penalty": (GREEDY, 2.0),
    "repetition_penalty": (GREEDY, 4.0),
    "temperature": ({}, 0.0),
    "top_p": ({}, 0.1),
    "top_k": ({}, 1),
    "min_p": ({}, 0.9),
    "seed": ({}, 2),
    "stop": (GREEDY, "text"),
    "stop_token_ids": (GREEDY, "token"),
    "ignore_eos": ({"logit_bias": {tiny.EOS: 100.0}}, True),
    "max_tokens": ({}, 3),
    "min_tokens": ({"logit_bias": {tiny.EOS: 100.0}}, 3),
    "logprobs": ({}, 0),
    "flat_logprobs": ({"logprobs": 0}, True),
    "detokenize": ({}, False),
    "skip_special_tokens": ({"logit_bias": {tiny.EOS: 100.0}, "ignore_eos": True}, False),
    "include_stop_str_in_output": ({**GREEDY, "stop": "text"}, True),
    "logit_bias": ({}, {30: 100.0}),
}
"""Other parameters, and the value that makes a difference beside them."""

VLLM_IDLE = {"output_kind": "FINAL_ONLY", "stream_interval": 3, "output_text_buffer_length": 5, "skip_clone": True}


def completed(llm, vllm, **given):
    """Everything that comes back for one prompt."""
    params = {"seed": 1, "max_tokens": 8, **given}
    if "text" in (params.get("stop"), params.get("stop_token_ids")) or params.get("stop_token_ids") == "token":
        plain = llm.generate([PROMPT], vllm.SamplingParams(**GREEDY, max_tokens=8))[0].outputs[0]
        found = {"stop": plain.text[2:4], "stop_token_ids": [plain.token_ids[3]]}
        params |= {name: found[name] for name in found if name in params}
    outputs = llm.generate([PROMPT], vllm.SamplingParams(**params))[0].outputs
    return [replace(one, cumulative_logprob=None) for one in outputs]


@pytest.mark.parametrize("name", sorted(names(VLLM["fields"]["vllm.SamplingParams"])))
def test_a_field_of_vllms_sampling_parameters(name, vllm, llm):
    surface = vllm_params.FIELDS
    assert (name in surface.honoured) + (name in surface.idle) < 2
    if name in surface.honoured:
        beside, value = VLLM_HONOURED[name]
        assert completed(llm, vllm, **beside) != completed(llm, vllm, **{**beside, name: value})
    elif name in surface.idle:
        value = vllm_params.RequestOutputKind.FINAL_ONLY if name == "output_kind" else VLLM_IDLE[name]
        assert completed(llm, vllm) == completed(llm, vllm, **{name: value}), surface.idle[name]
    else:
        with pytest.raises(ConfigError, match=rf"the fake vLLM engine has no .*{name}=.*{WHAT_TO_DO}"):
            completed(llm, vllm, **{name: [3] if name == "bad_words" else 3})


@pytest.mark.parametrize("count", [1, -1, True])
def test_log_probs_of_further_tokens_are_refused(count, vllm, llm):
    with pytest.raises(ConfigError, match=r"has no logprobs=(1|-1): logprobs=0 gives"):
        completed(llm, vllm, logprobs=count)


# -- Arguments of vLLM ------------------------------------------------------------------------------------------------


def probe(llm, vllm, **given):
    """Completions of two prompts, one seeded and one not."""
    several = [vllm.SamplingParams(seed=seed, max_tokens=8, logprobs=0, **given) for seed in (1, None)]
    return [one.outputs[0] for one in llm.generate([PROMPT, PROMPT], several)]


def fails(call):
    try:
        call()
    except Exception as error:  # noqa: BLE001 - the difference is that it fails
        return type(error).__name__
    return "works"


def stale(llm, vllm):
    """Log-probs with what the prefix cache has of former weights."""
    params = vllm.SamplingParams(**GREEDY, max_tokens=4, logprobs=0)
    llm.generate([PROMPT], params)
    other = [(name, tensor * 1.5) for name, tensor in tiny.text_model(1).state_dict().items()]
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(other)})
    return llm.generate([PROMPT], params)[0].outputs[0].logprobs


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another model, which draws by another temperature where nobody says how."""
    model = tiny.text_model(1)
    model.generation_config.update(do_sample=True, temperature=0.2)
    return on_cpu.save(model, tmp_path_factory.mktemp("other"))


VLLM_ARGUMENTS = {
    "model": lambda make, vllm, other: probe(make(), vllm) != probe(vllm.LLM(other), vllm),
    "tokenizer": lambda make, vllm, other: fails(lambda: make(tokenizer=other).get_tokenizer()) == "ValueError",
    "skip_tokenizer_init": lambda make, vllm, other: (
        fails(make(skip_tokenizer_init=True).get_tokenizer) != fails(make().get_tokenizer)
    ),
    "tensor_parallel_size": lambda make, vllm, other: fails(lambda: make(tensor_parallel_size=2)) == "ConfigError",
    "distributed_executor_backend": lambda make, vllm, other: (
        "does not divide"
        in error_of(lambda: make(tensor_parallel_size=2, distributed_executor_backend="external_launcher"))
    ),
    "dtype": lambda make, vllm, other: probe(make(), vllm) != probe(make(dtype="bfloat16"), vllm),
    "seed": lambda make, vllm, other: probe(make(), vllm)[1] != probe(make(seed=5), vllm)[1],
    "enable_prefix_caching": lambda make, vllm, other: (
        stale(make(), vllm) != stale(make(enable_prefix_caching=False), vllm)
    ),
    "limit_mm_per_prompt": lambda make, vllm, other: (
        fails(lambda: make(limit_mm_per_prompt={"audio": 1})) == "ConfigError"
    ),
    "load_format": lambda make, vllm, other: probe(make(), vllm) != probe(make(load_format="dummy"), vllm),
    "logprobs_mode": lambda make, vllm, other: (
        probe(make(), vllm, temperature=0.5) != probe(make(logprobs_mode="processed_logprobs"), vllm, temperature=0.5)
    ),
    "max_model_len": lambda make, vllm, other: (
        len(probe(make(max_model_len=8), vllm, ignore_eos=True)[0].token_ids) == 8 - len(PROMPT)
    ),
    "generation_config": lambda make, vllm, other: (
        vllm.LLM(other).get_default_sampling_params().temperature == 0.2
        and vllm.LLM(other, generation_config="vllm").get_default_sampling_params().temperature == 1.0
    ),
    "runner": lambda make, vllm, other: "has no runner='pooling'" in error_of(lambda: make(runner="pooling")),
    "convert": lambda make, vllm, other: "has no convert='embed'" in error_of(lambda: make(convert="embed")),
}
"""What each honoured argument changes."""


def error_of(call):
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(arguments.ARGUMENTS.honoured | {"model"}))
def test_an_argument_of_vllm_that_is_honoured(name, vllm, folder, other):
    assert VLLM_ARGUMENTS[name](lambda **given: vllm.LLM(folder, **given), vllm, other)


def test_arguments_of_vllm_that_are_idle_change_nothing(vllm, folder):
    expected = probe(vllm.LLM(folder), vllm)
    for name, why in arguments.ARGUMENTS.idle.items():
        texts = dict.fromkeys(("chat_template", "revision", "tokenizer_revision"), "<")
        value = {**texts, "gpu_memory_utilization": 0.5}.get(name, 3)
        assert probe(vllm.LLM(folder, **{name: value}), vllm) == expected, (name, why)


def test_all_other_arguments_of_vllm_are_refused(vllm, folder):
    recorded = {*names(VLLM["calls"]["vllm.LLM"]), *VLLM["arguments"]} - {"kwargs", "model"}
    rest = recorded - arguments.ARGUMENTS.honoured - arguments.ARGUMENTS.idle.keys()
    assert len(rest) > 200
    for name in sorted(rest):
        with pytest.raises(ConfigError, match=rf"the fake vLLM engine has no {name}.*{WHAT_TO_DO}"):
            vllm.LLM(folder, **{name: 3})
    with pytest.raises(TypeError, match="unexpected keyword argument 'tensor_parallel', which vLLM does not know"):
        vllm.LLM(folder, tensor_parallel=1)


IDLE_CALL = {"use_tqdm": False, "priority": [1]}


@pytest.mark.parametrize("name", sorted(names(VLLM["calls"]["vllm.LLM.generate"]) - {"prompts", "sampling_params"}))
def test_an_argument_of_vllms_generate(name, vllm, llm):
    params = vllm.SamplingParams(seed=1)
    if name in IDLE_CALL:
        found = llm.generate([PROMPT], params, **{name: IDLE_CALL[name]})
        assert found[0].outputs == llm.generate([PROMPT], params)[0].outputs
    else:
        with pytest.raises(ConfigError, match=rf"has no {name}=.*{WHAT_TO_DO}"):
            llm.generate([PROMPT], params, **{name: {"a": 1}})


@pytest.mark.parametrize(
    "call",
    [
        lambda llm: llm.generate([{"prompt_token_ids": PROMPT, "cache_salt": "a"}]),
        lambda llm: llm.collective_rpc("profile"),
        lambda llm: llm.collective_rpc("reload_weights", kwargs={"weights_path": "a"}),
    ],
)
def test_what_else_vllm_takes_is_refused(call, llm):
    with pytest.raises(ConfigError, match=WHAT_TO_DO):
        call(llm)
    with pytest.raises(AttributeError, match=WHAT_TO_DO):
        llm.beam_search  # noqa: B018 - there is none


# -- SGLang -----------------------------------------------------------------------------------------------------------

SGLANG_HONOURED = {
    "max_new_tokens": ({}, 3),
    "stop": (GREEDY, "text"),
    "stop_strs": (GREEDY, "text"),
    "stop_token_ids": (GREEDY, "token"),
    "temperature": ({}, 0.0),
    "top_p": ({}, 0.1),
    "top_k": ({}, 1),
    "min_p": ({}, 0.9),
    "frequency_penalty": (GREEDY, 2.0),
    "presence_penalty": (GREEDY, 2.0),
    "repetition_penalty": (GREEDY, 2.0),
    "min_new_tokens": ({"logit_bias": {str(tiny.EOS): 100.0}}, 3),
    "n": ({}, 2),
    "ignore_eos": ({"logit_bias": {str(tiny.EOS): 100.0}}, True),
    "skip_special_tokens": ({"logit_bias": {str(tiny.EOS): 100.0}, "no_stop_trim": True}, False),
    "no_stop_trim": ({**GREEDY, "stop": "text"}, True),
    "logit_bias": ({}, {"30": 100.0}),
    "sampling_seed": ({}, 2),
}

SGLANG_IDLE = {"stream_interval": 3, "stop_str_max_len": 5, "is_normalized": True}


def answered(engine, **given):
    params = {"sampling_seed": 1, "max_new_tokens": 8, **given}
    if "text" in (params.get("stop"), params.get("stop_strs")) or params.get("stop_token_ids") == "token":
        plain = engine.generate(input_ids=PROMPT, sampling_params={**GREEDY, "max_new_tokens": 8})
        found = {
            "stop": plain["text"][2:4],
            "stop_strs": plain["text"][2:4],
            "stop_token_ids": [plain["output_ids"][3]],
        }
        params |= {name: found[name] for name in found if name in params}
    found = engine.generate(input_ids=PROMPT, sampling_params=params)
    return [
        (one["output_ids"], one["text"], one["meta_info"]["finish_reason"])
        for one in (found if isinstance(found, list) else [found])
    ]


@pytest.mark.parametrize("name", sorted(names(SGLANG["SamplingParams"])))
def test_a_field_of_sglangs_sampling_parameters(name, engine):
    surface = sglang_params.FIELDS
    assert (name in surface.honoured) + (name in surface.idle) < 2
    if name in surface.honoured:
        beside, value = SGLANG_HONOURED[name]
        assert answered(engine, **beside) != answered(engine, **{**beside, name: value})
    elif name in surface.idle:
        assert answered(engine) == answered(engine, **{name: SGLANG_IDLE[name]}), surface.idle[name]
    else:
        with pytest.raises(ConfigError, match=rf"the fake SGLang engine has no .*{name}=.*{WHAT_TO_DO}"):
            answered(engine, **{name: 3})


IDLE_GENERATE = {"rid": "a", "priority": 3, "external_trace_header": {"a": "b"}, "routed_experts_start_len": 2}


@pytest.mark.parametrize(
    "name", sorted(names(SGLANG["Engine"]["generate"]) - {"self"} - set(sglang_engine.CALL.honoured))
)
def test_an_argument_of_sglangs_generate(name, engine):
    call = {"input_ids": PROMPT, "sampling_params": {"sampling_seed": 1}}
    if name in sglang_engine.CALL.idle:
        assert (
            engine.generate(**call, **{name: IDLE_GENERATE[name]})["output_ids"]
            == engine.generate(**call)["output_ids"]
        )
    else:
        with pytest.raises(ConfigError, match=rf"the fake SGLang engine has no {name}=.*{WHAT_TO_DO}"):
            engine.generate(**call, **{name: 3})


def drawn(engine, **more):
    one = engine.generate(input_ids=PROMPT, sampling_params={"max_new_tokens": 8, **more}, return_logprob=True)
    return one["output_ids"], one["meta_info"]["output_token_logprobs"], one.get("text")


def kept_or_lost(engine):
    engine.flush_cache()
    engine.release_memory_occupation(["weights"])
    engine.resume_memory_occupation(["weights"])
    return fails(lambda: drawn(engine))


def twice(engine):
    return drawn(engine, sampling_seed=4)[0] == drawn(engine, sampling_seed=4)[0]


def old_prefix(engine):
    """Log-probs with what the prefix cache has of former weights."""
    drawn(engine, **GREEDY)
    engine.begin_weight_update()
    engine.update_weights_from_tensor(
        [(name, tensor * 1.5) for name, tensor in tiny.text_model(1).state_dict().items()], flush_cache=False
    )
    engine.end_weight_update()
    return drawn(engine, **GREEDY)


SGLANG_ARGUMENTS = {
    "model_path": lambda make, other: drawn(make()) != drawn(make(model_path=other, skip_tokenizer_init=True)),
    "tokenizer_path": lambda make, other: "no tokenizer" in error_of(lambda: make(tokenizer_path=other)),
    "skip_tokenizer_init": lambda make, other: drawn(make(skip_tokenizer_init=True))[2] is None,
    "load_format": lambda make, other: drawn(make()) != drawn(make(load_format="dummy")),
    "context_length": lambda make, other: (
        len(drawn(make(context_length=5), max_new_tokens=None, ignore_eos=True)[0]) == 5 - len(PROMPT)
    ),
    "dtype": lambda make, other: drawn(make()) != drawn(make(dtype="bfloat16")),
    "tp_size": lambda make, other: payloads(make()) != payloads(make(tp_size=2)),
    "random_seed": lambda make, other: drawn(make()) != drawn(make(random_seed=7)),
    "disable_radix_cache": lambda make, other: old_prefix(make()) != old_prefix(make(disable_radix_cache=True)),
    "enable_memory_saver": lambda make, other: (
        (kept_or_lost(make()), kept_or_lost(make(enable_memory_saver=True))) == ("works", "EngineStateError")
    ),
    "enable_weights_cpu_backup": lambda make, other: (
        kept_or_lost(make(enable_memory_saver=True, enable_weights_cpu_backup=True)) == "works"
    ),
    "enable_deterministic_inference": lambda make, other: (
        not twice(make()) and twice(make(enable_deterministic_inference=True))
    ),
    "rl_on_policy_target": lambda make, other: not twice(make()) and twice(make(rl_on_policy_target="fsdp")),
    "weight_version": lambda make, other: (
        make(weight_version="7").generate(input_ids=PROMPT)["meta_info"]["weight_version"] == "7"
    ),
    "custom_weight_loader": lambda make, other: loaded_by(make(custom_weight_loader=[LOADER])) == ["given"],
}

LOADER = "collections.Counter"


def loaded_by(engine):
    """What a loader is given beside the model; without being named at the start it is none."""
    engine.begin_weight_update()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collections, "Counter", lambda model, weights: seen.extend(name for name, _ in weights))
        assert engine.update_weights_from_tensor([("given", torch.ones(1))], load_format=LOADER)[0]
    return seen


def payloads(engine):
    engine.begin_weight_update()
    serializer = importlib.import_module("sglang.srt.utils").MultiprocessingSerializer
    bucket = importlib.import_module("sglang.srt.weight_sync.tensor_bucket").FlattenedTensorBucket(
        named_tensors=[("model.norm.weight", torch.ones(64))]
    )
    payload = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    return engine.update_weights_from_tensor([serializer.serialize(payload)], load_format="flattened_bucket")


@pytest.mark.parametrize("name", sorted(server_args.ARGUMENTS.honoured))
def test_an_argument_of_sglang_that_is_honoured(name, sglang, folder, other):
    assert SGLANG_ARGUMENTS[name](
        lambda **given: sglang.Engine(**{"model_path": folder, "random_seed": 1, **given}), other
    )


def test_arguments_of_sglang_that_are_idle_change_nothing(sglang, folder):
    expected = drawn(sglang.Engine(model_path=folder, random_seed=1))
    for name, why in server_args.ARGUMENTS.idle.items():
        given = {name: "triton" if name == "attention_backend" else 3}
        assert drawn(sglang.Engine(model_path=folder, random_seed=1, **given)) == expected, (name, why)


def test_nothing_of_the_record_of_sglangs_arguments_is_passed_over():
    known = server_args.ARGUMENTS.honoured | server_args.ARGUMENTS.idle.keys()
    assert names(SGLANG["ServerArgs"]) <= known


@pytest.mark.parametrize(
    "call",
    [
        lambda engine: engine.begin_weight_update("draft"),
        lambda engine: (engine.begin_weight_update(), engine.update_weights_from_tensor([], load_format="direct")),
    ],
)
def test_what_else_sglang_takes_is_refused(call, sglang, folder):
    made = sglang.Engine(model_path=folder, skip_tokenizer_init=True)
    with pytest.raises(ConfigError, match=WHAT_TO_DO):
        call(made)
    with pytest.raises(AttributeError, match=WHAT_TO_DO):
        made.score  # noqa: B018 - there is none


# -- Through the adapters ---------------------------------------------------------------------------------------------

TEXTS_NEED = "needs the text of completions, and the fake .* engine was made without a tokenizer"


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_texts_that_end_a_completion_need_a_tokenizer(kind, vllm, sglang, other):
    calls = {
        "vllm": lambda: vllm.LLM(other).generate([PROMPT], vllm.SamplingParams(stop=["a"])),
        "sglang": lambda: sglang.Engine(model_path=other, skip_tokenizer_init=True).generate(
            input_ids=PROMPT, sampling_params={"stop": "a"}
        ),
    }
    with pytest.raises(ConfigError, match=TEXTS_NEED):
        calls[kind]()


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_an_adapter_passes_on_what_the_fake_engine_lacks(kind, installed, folder):
    adapter = importlib.import_module(f"lightrft.strategy.{kind}_utils")
    name = {"vllm": "vLLM", "sglang": "SGLang"}[kind]
    lacking = {"vllm": "quantization", "sglang": "load_format"}[kind]
    with pytest.raises(ConfigError, match=rf"not started: the fake {name} engine has no {lacking}='fp8'.*{WHAT_TO_DO}"):
        adapter.start(on_cpu.settings(folder, options={lacking: "fp8"}))
    made = adapter.start(on_cpu.settings(folder))
    field = {"vllm": "allowed_token_ids", "sglang": "regex"}[kind]
    with pytest.raises(ConfigError, match=rf"^the fake {name} engine has no {field}=.*{WHAT_TO_DO}"):
        made.generate([{"prompt_token_ids": PROMPT}], {field: "a"})
    made.shutdown()
