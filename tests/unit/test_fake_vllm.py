"""The face of vLLM in front of the fake engine."""

import importlib
import sys

import pytest
import torch
import torch.distributed as dist

from lightrft.errors import ConfigError, EngineStateError, RankFailedError, StaleWeightsError
from lightrft.models.tiny import LETTERS, SPECIAL, VOCABULARY, text_model, tiny_text_model, tokenizer
from lightrft.sim import SimWorld
from lightrft.sim.engine.faces import MODES, faces

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    text_model().save_pretrained(path)  # and no tokenizer
    return path


@pytest.fixture(params=MODES)
def vllm(request):
    with faces(request.param):
        yield importlib.import_module("vllm")


def test_an_import_gives_the_face_meanwhile_and_no_longer():
    before = sys.modules.get("vllm")
    with faces():
        import vllm
        from vllm.outputs import RequestOutput

        assert (RequestOutput, vllm.__version__) == (vllm.RequestOutput, "0.32.0")
        with pytest.raises(ModuleNotFoundError, match=r"has no vllm.lora: .* SimWorld\(engines=False\)"):
            importlib.import_module("vllm.lora")
    assert sys.modules.get("vllm") is before
    with pytest.raises(ConfigError, match="no mode 'fast': expected one of model, hash"), faces("fast"):
        pass


@pytest.mark.parametrize("engines", ["hash", "model", False])
def test_in_a_world_an_import_gives_the_face(engines):
    def program():
        try:
            import vllm
        except ModuleNotFoundError:
            return None
        return vllm.LLM.__module__

    found = "vllm.entrypoints.llm" if engines else None
    assert SimWorld(2, engines=engines).run(program) == [found] * 2
    with pytest.raises(ConfigError, match="expected False, or one of model, hash"):
        SimWorld(2, engines="real")


def test_outputs_have_the_form_of_vllm(vllm, folder):
    llm = vllm.LLM(folder, dtype="float32")
    params = vllm.SamplingParams(n=2, seed=1, max_tokens=4, logprobs=0, ignore_eos=True)
    first, second = llm.generate([{"prompt_token_ids": [3, 4]}, [5]], params, use_tqdm=False)
    assert (first.prompt_token_ids, second.prompt_token_ids) == ([3, 4], [5])
    assert [one.index for one in first.outputs] == [0, 1]
    assert first.finished
    assert (first.num_cached_tokens, first.num_cache_creation_tokens) == (0, 0)
    assert first.request_id != second.request_id
    for one in (*first.outputs, *second.outputs):
        assert len(one.token_ids) == 4
        assert [list(each) for each in one.logprobs] == [[token] for token in one.token_ids]
        chosen = [each[token].logprob for each, token in zip(one.logprobs, one.token_ids, strict=True)]
        assert one.cumulative_logprob == pytest.approx(sum(chosen))
        assert (one.finish_reason, one.stop_reason, one.finished()) == ("length", None, True)
    assert first.outputs[0].token_ids != first.outputs[1].token_ids
    plain = llm.generate([5], vllm.SamplingParams(seed=1))[0].outputs[0]
    assert plain.logprobs is plain.cumulative_logprob is None
    assert llm.generate([], params) == []


def test_a_seed_means_the_same_in_every_call_and_none_another_each_time(vllm, folder):
    llm = vllm.LLM(folder)
    seeded, unseeded = (vllm.SamplingParams(seed=seed, max_tokens=12, ignore_eos=True) for seed in (7, None))

    def tokens(params, prompts=([3, 4],)):
        return [one.outputs[0].token_ids for one in llm.generate(list(prompts), params)]

    assert tokens(seeded) == tokens(seeded) == tokens(seeded, ([5], [3, 4]))[1:]
    assert tokens(unseeded) != tokens(unseeded)
    again = vllm.LLM(folder).generate([3, 4], unseeded)[0].outputs[0].token_ids
    assert again == vllm.LLM(folder).generate([3, 4], unseeded)[0].outputs[0].token_ids
    n = vllm.SamplingParams(n=2, seed=7, max_tokens=12, ignore_eos=True)
    assert llm.generate([3, 4], n)[0].outputs[0].token_ids == tokens(seeded)[0]


def test_objects_of_the_face_pass_for_those_of_vllm(vllm, folder):
    from lightrft.strategy import is_engine
    from lightrft.strategy.sampling import SamplingParams

    assert is_engine(vllm.LLM(folder))
    given = vllm.SamplingParams(n=2, seed=4, max_tokens=7, logprobs=0, stop_token_ids=[3])
    ours = SamplingParams(n=2, seed=4, max_tokens=7, logprobs=True, stop_token_ids=(3,))
    assert SamplingParams.of(given) == ours
    assert ours.to_vllm(vllm.SamplingParams) == given
    with pytest.raises(ConfigError, match="vLLM refuses them: temperature=3: expected 0 to 2"):
        SamplingParams(temperature=3).to_vllm(vllm.SamplingParams)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[]], "a prompt is empty"),
        ([[VOCABULARY]], f"outside of the vocabulary of {VOCABULARY}"),
        ([[3], [-1]], "outside of the vocabulary"),
        ([[3] * 256], "leaves no room for a completion: max_model_len is 256"),
        (["text"], "no tokenizer"),
        ([{"prompt_token_ids": [3], "multi_modal_data": {"image": ["i"]}}], "takes no image"),
    ],
)
def test_prompts_that_cannot_be_completed_are_refused(vllm, folder, prompts, message):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=message):
        vllm.LLM(folder).generate(prompts)


@pytest.mark.parametrize(
    "prompts",
    [
        torch.tensor([3, 4]),
        torch.tensor([[3, 4]]),
        [torch.tensor([3, 4])],
        [{"prompt_token_ids": torch.tensor([3, 4])}],
        (3, 4),
        [(3, 4)],
        range(3, 5),
        [[3.0, 4.0]],
        [None],
        [{}],
        [{"prompt": 3}],
    ],
)
def test_prompts_of_other_types_than_those_of_vllm_are_refused(vllm, folder, prompts):
    with pytest.raises(TypeError, match="a prompt|prompt_token_ids"):
        vllm.LLM(folder).generate(prompts)


@pytest.mark.parametrize("given", [{"temperature": 0}, [{"temperature": 0}], "a"])
def test_parameters_of_other_types_than_those_of_vllm_are_refused(vllm, folder, given):
    with pytest.raises(TypeError, match=r"sampling_params is a (dict|str): expected SamplingParams"):
        vllm.LLM(folder).generate([[3]], given)


def test_more_tokens_at_least_than_fit_are_refused(vllm, folder):
    from vllm.exceptions import VLLMValidationError

    llm = vllm.LLM(folder, max_model_len=10)
    fits = vllm.SamplingParams(max_tokens=None, min_tokens=8)
    assert len(llm.generate([[3] * 2], fits)[0].outputs[0].token_ids) == 8
    with pytest.raises(VLLMValidationError, match="min_tokens=8: expected at most 7"):
        llm.generate([[3] * 3], fits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n=0: expected at least 1"),
        ({"n": 16385}, "n=16385: expected at least 1, and at most 16384"),
        ({"n": 2.5}, "n=2.5"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"temperature": 2.5}, "temperature=2.5: expected 0 to 2"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"min_tokens": 20}, "min_tokens=20: expected 0 to max_tokens"),
        ({"temperature": 0, "n": 2}, "expected 1 where the temperature is 0"),
        ({"stop": ["a"], "detokenize": False}, "where detokenize is False"),
        ({"repetition_penalty": 0}, "repetition_penalty=0"),
    ],
)
def test_parameters_that_are_not_allowed_are_refused(given, message):
    with faces():
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError

        with pytest.raises(VLLMValidationError, match=message):
            SamplingParams(**given)


def test_a_completion_ends_at_the_length_of_the_model(vllm, folder):
    llm = vllm.LLM(folder, max_model_len=10)
    assert llm.llm_engine.model_config.max_model_len == 10
    found = llm.generate([[3] * 6, [3]], vllm.SamplingParams(max_tokens=50, ignore_eos=True, seed=1))
    assert [len(one.outputs[0].token_ids) for one in found] == [4, 9]


def test_f02_generation_while_it_sleeps_is_an_error_and_no_wait(vllm, folder):
    llm = vllm.LLM(folder)
    llm.sleep()
    assert llm.llm_engine.is_sleeping()
    with pytest.raises(EngineStateError, match=r"generate at .*test_fake_vllm.py:\d+: the fake vLLM engine is asleep"):
        llm.generate([3])
    llm.wake_up(tags=["weights"])
    assert llm.llm_engine.is_sleeping()
    llm.wake_up(tags=["kv_cache"])
    assert not llm.llm_engine.is_sleeping()
    assert llm.generate([3])
    llm.llm_engine.engine_core.shutdown()
    with pytest.raises(EngineStateError, match="was shut down"):
        llm.generate([3])


def test_f01_f05_weights_and_caches_are_what_the_calls_made_of_them(vllm, folder, tmp_path):
    other = tiny_text_model(str(tmp_path), seed=1).state_dict()
    llm = vllm.LLM(folder)
    params = vllm.SamplingParams(seed=3, max_tokens=12, ignore_eos=True)

    def tokens():
        return llm.generate([3, 4, 5, 6], params)[0].outputs[0].token_ids

    tokens()
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(other.items())})
    stale = tokens()
    llm.reset_prefix_cache()
    fresh = tokens()
    assert fresh == vllm.LLM(str(tmp_path)).generate([3, 4, 5, 6], params)[0].outputs[0].token_ids != stale
    llm.sleep(level=2)
    llm.wake_up()
    with pytest.raises(StaleWeightsError, match="has dropped its weights"):
        tokens()
    llm.collective_rpc(lambda worker: worker.reload_weights(weights_iterator=iter(other.items())))
    assert tokens() == fresh


def test_images_count_and_their_cache_outlives_an_update_unless_it_is_reset(tmp_path):
    trained = tiny_text_model(str(tmp_path), image_token_id=9)
    with faces("hash"):
        import vllm

        llm = vllm.LLM(str(tmp_path))

        def tokens(*images, prompt=(3, 9, 4)):
            asked = {"prompt_token_ids": list(prompt), "multi_modal_data": {"image": list(images)}}
            found = llm.generate([asked], vllm.SamplingParams(seed=3, max_tokens=12, ignore_eos=True))[0]
            return found.prompt_token_ids, found.outputs[0].token_ids

        expanded, first = tokens(torch.zeros(2, 2))
        assert expanded == [3, 9, 9, 9, 9, 4]
        assert tokens(torch.zeros(2, 2))[1] == first != tokens(torch.ones(2, 2))[1]
        two = tokens(torch.zeros(2, 2), torch.ones(2, 2), prompt=(9, 9))[1]
        assert two != tokens(torch.ones(2, 2), torch.zeros(2, 2), prompt=(9, 9))[1]
        with pytest.raises(Exception, match="has 1 image tokens for 2 images"):
            tokens(torch.zeros(1), torch.zeros(1))
        doubled = [(name, tensor * 2) for name, tensor in trained.state_dict().items()]
        llm.collective_rpc("reload_weights", args=(doubled,))
        llm.reset_prefix_cache()
        stale = tokens(torch.zeros(2, 2))[1]
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()
        assert stale != tokens(torch.zeros(2, 2))[1]


def on_ranks(size, program, **world):
    def run():
        import vllm

        dist.init_process_group("gloo")
        found = program(vllm, dist.get_rank())
        dist.destroy_process_group()
        return found

    return SimWorld(size, **{"engines": "hash", **world}).run(run)


@pytest.mark.parametrize("engines", MODES)
def test_ranks_share_an_engine_and_get_the_same(folder, engines):
    def program(vllm, rank):
        llm = vllm.LLM(folder, tensor_parallel_size=2, distributed_executor_backend="external_launcher")
        prompts = [[3, 4], [5, 6 + rank // 2]]
        return [one.outputs[0].token_ids for one in llm.generate(prompts, vllm.SamplingParams(seed=2))]

    found = on_ranks(4, program, engines=engines)
    assert found[0] == found[1]
    assert found[2] == found[3] != found[0]
    with faces(engines):
        import vllm

        alone = vllm.LLM(folder).generate([[3, 4], [5, 6]], vllm.SamplingParams(seed=2))
        assert [one.outputs[0].token_ids for one in alone] == found[0]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda rank: ([[3, 4 + rank]], {"seed": 1}), "the prompts of the fake vLLM engine differ between"),
        (lambda rank: ([[3]], {"seed": rank}), "the seeds of the fake vLLM engine differ"),
        (lambda rank: ([[3]], {"seed": 1, "temperature": 0.5 + rank / 2}), "the sampling parameters .* differ"),
        (lambda rank: ([[3]], {}), "sampling without a seed on 2 tensor-parallel ranks"),
    ],
)
def test_f12_ranks_of_one_engine_that_ask_for_different_things_are_told(folder, asked, message):
    def program(vllm, rank):
        llm = vllm.LLM(folder, tensor_parallel_size=2, distributed_executor_backend="external_launcher")
        prompts, params = asked(rank)
        llm.generate(prompts, vllm.SamplingParams(**params))

    with pytest.raises(RankFailedError, match=message):
        on_ranks(2, program)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_model_len": 257}, r"max_model_len \(257\) is greater .*max_position_embeddings=256"),
        ({"max_model_len": 0}, "max_model_len=0: expected a number of tokens"),
        ({"max_model_len": -5}, "max_model_len=-5"),
        ({"max_model_len": 64.5}, "max_model_len=64.5"),
        ({"gpu_memory_utilization": 2}, "gpu_memory_utilization=2: expected above 0, at most 1"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization=0"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0: expected 1 or more"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"seed": "a"}, "seed='a': expected an integer"),
    ],
)
def test_values_that_vllm_does_not_start_with_are_refused(vllm, folder, arguments, message):
    with pytest.raises(ValueError, match=message):
        vllm.LLM(folder, **arguments)


def test_the_model_says_how_long_a_context_is_and_a_variable_overrules_it(vllm, folder, tmp_path, monkeypatch):
    assert [vllm.LLM(folder, max_model_len=most).model_config.max_model_len for most in (None, -1, 256)] == [256] * 3
    stretched = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    text_model(rope_parameters=stretched).save_pretrained(tmp_path)
    assert vllm.LLM(str(tmp_path)).model_config.max_model_len == 512
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    assert vllm.LLM(folder, max_model_len=300).model_config.max_model_len == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tensor_parallel_size": 2}, "distributed_executor_backend=None"),
        (
            {"tensor_parallel_size": 3, "distributed_executor_backend": "external_launcher"},
            "does not divide a world of 2",
        ),
        ({"dtype": "int3"}, "dtype 'int3': expected one of auto"),
    ],
)
def test_engines_that_cannot_be_are_refused(folder, arguments, message):
    with pytest.raises(RankFailedError, match=message):
        on_ranks(2, lambda vllm, rank: vllm.LLM(folder, **arguments))


def test_folders_without_a_model_or_weights_are_refused(tmp_path):
    with faces("model"):
        import vllm

        with pytest.raises(ConfigError, match="there is no model in"):
            vllm.LLM(str(tmp_path / "none"))
        tiny_text_model(str(tmp_path))
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ConfigError, match="there are no weights"):
            vllm.LLM(str(tmp_path))
        assert vllm.LLM(str(tmp_path), load_format="dummy").generate([3])
        with pytest.raises(TypeError, match="unexpected keyword argument 'tensor_parallel'"):
            vllm.LLM(str(tmp_path), tensor_parallel=1)
    with faces("hash"):
        import vllm

        llm = vllm.LLM("any/name")
        with pytest.raises(StaleWeightsError, match="holds no weights"):
            llm.generate([3])
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": [("w", torch.ones(3))]})
        assert llm.generate([3])


def test_flat_log_probs_are_those_by_position(vllm, folder):
    from vllm.logprobs import FlatLogprobs, Logprob

    llm = vllm.LLM(folder)
    plain, flat = (
        llm.generate([3, 4], vllm.SamplingParams(seed=1, max_tokens=5, logprobs=0, flat_logprobs=flat))[0].outputs[0]
        for flat in (False, True)
    )
    assert isinstance(flat.logprobs, FlatLogprobs)
    assert [list(one) for one in flat.logprobs] == [[token] for token in plain.token_ids]
    assert all(isinstance(each, Logprob) for one in flat.logprobs for each in one.values())
    found = flat.logprobs
    assert (list(found.token_ids), len(found), len(found[1:3])) == (list(plain.token_ids), len(plain.token_ids), 2)
    for position, (start, end) in enumerate(zip(found.start_indices, found.end_indices, strict=True)):
        assert list(found.token_ids[start:end]) == list(found[position])
    assert found.ranks == found.decoded_tokens == [None] * len(found)


def test_a_text_has_what_ended_it_only_if_asked(tmp_path):
    tiny_text_model(tmp_path)
    with faces():
        import vllm

        llm = vllm.LLM(str(tmp_path))

        letters = range(len(SPECIAL), len(SPECIAL) + len(LETTERS))
        no_others = {token: -100.0 for token in range(VOCABULARY) if token not in letters}

        def text(**params):
            given = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logit_bias": no_others, **params}
            return llm.generate([[7, 8]], vllm.SamplingParams(**given))[0].outputs[0]

        whole = text()
        last = tokenizer().decode([whole.token_ids[-1]])
        assert len(whole.text) == 8
        before = whole.text[: whole.text.index(last)]
        for ended in ({"stop": [last]}, {"stop_token_ids": [whole.token_ids[-1]]}):
            found = text(**ended)
            assert (found.text, found.finish_reason) == (before, "stop")
            assert text(**ended, include_stop_str_in_output=True).text == before + last
        early = text(stop=[whole.text[0]], min_tokens=3)
        assert early.text.startswith(whole.text[:3]), "a text that had come before min_tokens ends nothing"


def test_prompts_may_be_those_of_vllm_inputs(vllm, tmp_path):
    from vllm.inputs import TextPrompt, TokensPrompt

    assert (vllm.TextPrompt, vllm.TokensPrompt) == (TextPrompt, TokensPrompt)
    tiny_text_model(tmp_path)
    llm = vllm.LLM(str(tmp_path))
    asked = vllm.SamplingParams(temperature=0, max_tokens=4)
    text = llm.get_tokenizer().decode([20, 21, 22])
    ids = llm.get_tokenizer().encode(text)
    first, second = llm.generate([TokensPrompt(prompt_token_ids=ids), TextPrompt(prompt=text)], asked)
    assert first.prompt_token_ids == second.prompt_token_ids == ids
    assert first.outputs[0].token_ids == second.outputs[0].token_ids


def test_flat_log_probs_grow_at_their_end(vllm):
    from vllm.logprobs import FlatLogprobs, Logprob

    found = FlatLogprobs()
    positions = [{3: Logprob(-1.0, 1, "a"), 4: Logprob(-2.0, 2, "b")}, {}, {5: Logprob(-3.0)}]
    found.extend(positions)
    assert list(found) == positions
    assert (found.start_indices, found.end_indices) == ([0, 2, 2], [2, 2, 3])
    assert list(found[1:]) == positions[1:]
    for change in (lambda: found.insert(0, {}), found.pop, lambda: found.__setitem__(0, {})):
        with pytest.raises(TypeError, match="added at the end"):
            change()


def test_lacking_arguments_are_taken_with_their_defaults_alone(vllm, folder):
    assert vllm.LLM(folder, enable_lora=False, max_loras=1)
    assert vllm.EngineArgs(enable_lora=True).enable_lora
    with pytest.raises(ConfigError, match="the fake vLLM engine has no enable_lora=True, max_loras=2: "):
        vllm.LLM(folder, enable_lora=True, max_loras=2)
    with pytest.raises(TypeError, match="'max_lora', which vLLM does not know"):
        vllm.LLM(folder, max_lora=2)
