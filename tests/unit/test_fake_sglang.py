"""The face of SGLang in front of the fake engine."""

import importlib

import pytest
import torch

from lightrft.errors import ConfigError, EngineStateError
from lightrft.models.tiny import VOCABULARY, tiny_text_model
from lightrft.sim.engine.faces import MODES, faces
from lightrft.strategy import is_engine
from lightrft.strategy.sampling import SamplingParams

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    tiny_text_model(path)
    return path


@pytest.fixture(params=MODES)
def sglang(request):
    with faces(request.param):
        yield importlib.import_module("sglang")


def engine(sglang, folder, **given):
    return sglang.Engine(model_path=folder, skip_tokenizer_init=True, random_seed=1, **given)


def payload(weights):
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    bucket = FlattenedTensorBucket(named_tensors=list(weights))
    flat = {"flattened_tensor": bucket.get_flattened_tensor(), "metadata": bucket.get_metadata()}
    return MultiprocessingSerializer.serialize(flat)


def update(made, weights, ranks=1):
    assert made.begin_weight_update()[0]
    payloads = [payload(weights) for _ in range(ranks)]
    found = made.update_weights_from_tensor(payloads, load_format="flattened_bucket", flush_cache=False)
    assert made.end_weight_update()[0]
    return found


GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


def test_outputs_have_the_form_of_sglang(sglang, folder):
    made = engine(sglang, folder)
    assert is_engine(made)
    one = made.generate(input_ids=[3, 4], sampling_params=GREEDY, return_logprob=True)
    assert len(one["output_ids"]) == 12
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 12}
    assert (one["meta_info"]["prompt_tokens"], one["meta_info"]["completion_tokens"]) == (2, 12)
    assert [token for _, token, _ in one["meta_info"]["output_token_logprobs"]] == one["output_ids"]
    assert all(value <= 0 and text is None for value, _, text in one["meta_info"]["output_token_logprobs"])
    several = made.generate(input_ids=[[3, 4], [5]], sampling_params={"n": 2, "max_new_tokens": 3})
    assert [each["prompt_token_ids"] for each in several] == [[3, 4], [3, 4], [5], [5]]
    assert "output_token_logprobs" not in several[0]["meta_info"]
    each = made.generate(input_ids=[[3], [5]], sampling_params=[{"max_new_tokens": 2, "ignore_eos": True}, GREEDY])
    assert [len(found["output_ids"]) for found in each] == [2, 12]
    stop = one["output_ids"][2]
    ending = {**GREEDY, "ignore_eos": False, "stop_token_ids": [stop]}
    ended = made.generate(input_ids=[3, 4], sampling_params=ending)
    assert ended["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_f16_log_probs_are_of_logits_over_temperature_unless_asked_otherwise(folder, monkeypatch):
    trained = tiny_text_model(folder)
    with faces("model"):
        import sglang

        found = {}
        for raw in ("0", "1"):
            monkeypatch.setenv("SGLANG_RETURN_ORIGINAL_LOGPROB", raw)
            params = {"temperature": 0.5, "top_k": 5, "max_new_tokens": 5, "ignore_eos": True}
            found[raw] = engine(sglang, folder).generate(input_ids=[3, 4], sampling_params=params, return_logprob=True)
    for raw, one in found.items():
        logits = trained(torch.tensor([[3, 4, *one["output_ids"]]])).logits[0, 1:-1] / (1.0 if raw == "1" else 0.5)
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(one["output_ids"]).unsqueeze(1)).squeeze(1)
        got = torch.tensor([value for value, *_ in one["meta_info"]["output_token_logprobs"]])
        torch.testing.assert_close(got, chosen, atol=1e-5, rtol=0)


def test_seeds_count_only_where_inference_is_deterministic(sglang, folder):
    params = {"max_new_tokens": 12, "ignore_eos": True, "sampling_seed": 5}
    for deterministic in (False, True):
        made = engine(sglang, folder, enable_deterministic_inference=deterministic)
        first, second = (made.generate(input_ids=[3], sampling_params=params)["output_ids"] for _ in range(2))
        assert (first == second) is deterministic


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": []}, "input_ids cannot be empty"),
        ({"input_ids": [3] * 256}, "as long as the context, 256"),
        ({"input_ids": [3] * 250, "sampling_params": {"max_new_tokens": 7}}, "max_new_tokens=7 are more than .* 256"),
        ({"input_ids": [[3], [4]], "sampling_params": [{"n": 2}, {}]}, "n differs from prompt to prompt"),
        ({"prompt": "text"}, "no tokenizer"),
        ({}, "expected prompt or input_ids"),
        ({"input_ids": [3], "sampling_params": {"temperature": -1}}, "temperature=-1"),
        ({"input_ids": [3], "sampling_params": {"top_p": 0}}, "top_p=0"),
        ({"input_ids": [3], "sampling_params": {"max_new_tokens": -1}}, "max_new_tokens=-1"),
        ({"input_ids": [3], "sampling_params": {"min_new_tokens": 200}}, "min_new_tokens=200"),
        ({"input_ids": [3], "image_data": ["i"]}, "takes no images"),
    ],
)
def test_requests_that_are_not_allowed_are_refused(sglang, folder, given, message):
    with pytest.raises(ValueError, match=message):
        engine(sglang, folder).generate(**given)
    with pytest.raises(TypeError, match="max_tokens"):
        engine(sglang, folder).generate(input_ids=[3], sampling_params={"max_tokens": 3})


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"context_length": 257}, ValueError, r"context_length \(257\) is greater than .* \(256\)"),
        ({"context_length": 0}, RuntimeError, "the scheduler died: context_length=0, expected 2 or more"),
        ({"context_length": -1}, RuntimeError, "context_length=-1"),
        ({"tp_size": 0}, ValueError, "tp_size=0: expected 1 or more"),
        ({"attention_backend": "bogus"}, RuntimeError, "attention_backend='bogus', expected one of triton"),
    ],
)
def test_settings_that_sglang_does_not_start_with_are_refused(sglang, folder, given, error, message):
    with pytest.raises(error, match=message):
        engine(sglang, folder, **given)


def test_a_variable_allows_a_longer_context_than_the_model_has(sglang, folder, monkeypatch):
    monkeypatch.setenv("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1")
    assert engine(sglang, folder, context_length=300).generate(
        input_ids=[3] * 256, sampling_params={"max_new_tokens": 1}
    )


def test_a_completion_that_no_length_was_asked_for_is_cut_where_the_context_ends(sglang, folder):
    found = engine(sglang, folder).generate(input_ids=[3] * 200, sampling_params={"ignore_eos": True})
    assert found["meta_info"]["finish_reason"]["type"] == "length"
    assert len(found["output_ids"]) < 128


def dies(made, call, message):
    with pytest.raises(EngineStateError, match=message):
        call(made)
    with pytest.raises(EngineStateError, match=r"flush_cache at .*test_fake_sglang.py:\d+: the fake SGLang engine"):
        made.flush_cache()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda made: made.resume_memory_occupation(["weights"]), "resume weights, which was never released"),
        (lambda made: made.generate(input_ids=[[]]), "was given an empty prompt"),
        (lambda made: made.generate(input_ids=[VOCABULARY]), "a token outside of its vocabulary"),
        (lambda made: (made.generate(input_ids=[3]), made.release_memory_occupation()), "flush_cache comes before"),
        (lambda made: [made.release_memory_occupation() for _ in range(2)], "release kv_cache, .* twice, since"),
        (lambda made: update(made, [("model.other", torch.ones(2))]), "model.other is no weight of this model"),
        (lambda made: update(made, [("model.norm.weight", torch.ones(2))]), r"has shape \(2,\), expected \(64,\)"),
    ],
)
def test_f17_what_kills_a_scheduler_is_told_and_the_engine_is_dead(sglang, folder, call, message):
    dies(engine(sglang, folder), call, message)


def test_f02_generation_with_released_memory_is_an_error_and_no_wait(sglang, folder):
    made = engine(sglang, folder)
    before = made.generate(input_ids=[3], sampling_params=GREEDY)["output_ids"]
    made.flush_cache()
    made.release_memory_occupation(["kv_cache"])
    with pytest.raises(EngineStateError, match=r"the kv_cache of the fake SGLang engine are released, since .*:\d+"):
        made.generate(input_ids=[3])
    made.resume_memory_occupation(["kv_cache"])
    assert made.generate(input_ids=[3], sampling_params=GREEDY)["output_ids"] == before


@pytest.mark.parametrize("backup", [True, False])
def test_f01_weights_that_are_released_without_a_backup_are_lost(sglang, folder, backup):
    weights = tiny_text_model(folder).state_dict().items()
    made = engine(sglang, folder, enable_memory_saver=True, enable_weights_cpu_backup=backup)
    before = made.generate(input_ids=[3], sampling_params=GREEDY)["output_ids"]
    made.flush_cache()
    made.release_memory_occupation()
    made.resume_memory_occupation()
    if not backup:
        with pytest.raises(EngineStateError, match="has lost its weights in a release without backup"):
            made.generate(input_ids=[3])
        update(made, list(weights)[1:])
        with pytest.raises(EngineStateError, match="not all were sent again"):
            made.generate(input_ids=[3])
        update(made, list(weights)[:1])
    assert made.generate(input_ids=[3], sampling_params=GREEDY)["output_ids"] == before


def test_f05_updates_replace_weights_and_leave_the_caches(sglang, folder, tmp_path):
    other = tiny_text_model(str(tmp_path), seed=1).state_dict()
    made = engine(sglang, folder, tp_size=2)
    long = [3, 4, 5, 6]
    made.generate(input_ids=long, sampling_params=GREEDY)
    assert update(made, other.items(), ranks=2) == (True, "updated")
    stale = made.generate(input_ids=long, sampling_params=GREEDY)["output_ids"]
    assert made.flush_cache().success
    fresh = made.generate(input_ids=long, sampling_params=GREEDY)["output_ids"]
    assert fresh == engine(sglang, str(tmp_path)).generate(input_ids=long, sampling_params=GREEDY)["output_ids"]
    if stale == fresh:
        pytest.fail("the prefix cache did not outlive the update")


def test_updates_that_are_refused_say_so_and_raise_nothing(sglang, folder):
    made = engine(sglang, folder, tp_size=2)
    weights = list(tiny_text_model(folder).state_dict().items())[:1]
    assert made.update_weights_from_tensor([payload(weights)] * 2, load_format="flattened_bucket")[0] is False
    assert made.end_weight_update()[0] is False
    assert made.begin_weight_update()[0]
    assert made.begin_weight_update()[0] is False
    once = payload(weights)
    assert made.update_weights_from_tensor([once], load_format="flattened_bucket") == (
        False,
        "1 payloads for 2 ranks of the engine",
    )
    with pytest.raises(ValueError, match="read twice"):
        made.update_weights_from_tensor([once, once], load_format="flattened_bucket")


def test_f08_a_payload_holds_what_its_memory_holds_when_it_is_read(sglang, folder):
    made = engine(sglang, folder)
    tensor = torch.ones(64)
    handle = payload([("model.norm.weight", tensor)])
    tensor.fill_(2)  # flattened already: a bucket is a copy
    made.begin_weight_update()
    made.update_weights_from_tensor([handle], load_format="flattened_bucket")
    held = made._core.model
    found = (
        held._weights["model.norm.weight"]
        if isinstance(held._weights, dict)
        else held._weights.held["model.norm.weight"]
    )
    assert torch.equal(found.float(), torch.ones(64))


def test_images_need_one_token_each(tmp_path):
    tiny_text_model(str(tmp_path), image_token_id=9)
    with faces("hash"):
        import sglang

        made = engine(sglang, str(tmp_path))
        one = made.generate(input_ids=[3, 9], image_data=torch.zeros(2), sampling_params=GREEDY)
        assert one["prompt_token_ids"] == [3, 9, 9, 9, 9]
        two = made.generate(input_ids=[[3, 9]], image_data=[[torch.ones(2)]], sampling_params=GREEDY)[0]
        assert one["output_ids"] != two["output_ids"]
        dies(made, lambda made: made.generate(input_ids=[9, 9], image_data=["i"]), "was given 2 image tokens for 1")


def test_an_object_of_the_face_passes_for_one_of_sglang():
    with faces():
        from sglang.srt.sampling.sampling_params import SamplingParams as Theirs

        ours = SamplingParams(temperature=0.5, max_tokens=7, n=2, stop=("a",), seed=4, top_k=3)
        assert SamplingParams.of(Theirs(**ours.to_sglang(Theirs))) == ours
        assert SamplingParams.of(Theirs()) == SamplingParams(max_tokens=128)
        with pytest.raises(ConfigError, match="SGLang has no bad_words"):
            SamplingParams(options={"bad_words": ["x"]}).to_sglang(Theirs)


def test_an_engine_is_shut_down_at_the_end_of_its_block(sglang, folder):
    with engine(sglang, folder) as made:
        assert made.generate(input_ids=[3])
    with pytest.raises(EngineStateError, match="was shut down"):
        made.generate(input_ids=[3])


def test_an_engine_may_be_given_its_arguments_as_an_object(sglang, folder):
    arguments = sglang.ServerArgs(model_path=folder, skip_tokenizer_init=True, weight_version="7")
    made = sglang.Engine(server_args=arguments)
    assert made.server_args is arguments
    assert made.generate(input_ids=[3])["meta_info"]["weight_version"] == "7"


def test_lacking_arguments_are_taken_with_their_defaults_alone(sglang, folder):
    assert engine(sglang, folder, dp_size=1, enable_lora=None)
    with pytest.raises(ConfigError, match="the fake SGLang engine has no dp_size=2, enable_lora=True: "):
        engine(sglang, folder, enable_lora=True, dp_size=2)
    with pytest.raises(TypeError, match="enable_lor"):
        engine(sglang, folder, enable_lor=True)


def test_a_bucket_tells_bytes_and_its_parts(sglang):
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    assert sglang
    bucket = FlattenedTensorBucket(named_tensors=[("a", torch.ones(3)), ("b", torch.ones(2, dtype=torch.bfloat16))])
    assert [one.numel for one in bucket.metadata] == [12, 4]
    assert bucket.flattened_tensor.numel() == 16
    assert [name for name, _ in bucket.reconstruct_tensors()] == ["a", "b"]
