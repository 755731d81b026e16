"""What is vLLM's own beside the contract of engines. The tests share one engine, which holds A before each of them."""

import random

import pytest
import torch
from engines import on_cpu
from transformers import GenerationConfig

from lightrft.errors import ConfigError, EngineStateError, WeightSyncError
from lightrft.models import tiny
from lightrft.strategy import vllm_utils, weight_sync
from lightrft.strategy.engine import EngineStatus
from lightrft.strategy.vllm_utils import engine as adapter

# What vLLM and what it imports warn of is not ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::lightrft")]


def prompt_of(length):
    """Token ids without special ones."""
    return random.Random(length).choices(range(len(tiny.SPECIAL), tiny.VOCABULARY), k=length)


A, B = (tiny.text_model(seed, tie_word_embeddings=True) for seed in (0, 1))
PROMPTS = [prompt_of(length) for length in (3, 9, 40)]
GREEDY = {"temperature": 0, "max_tokens": 12, "logprobs": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = on_cpu.save(A, tmp_path_factory.mktemp("model"))
    settings = on_cpu.settings(
        folder, max_model_len=96, max_tokens=7, seed=3, options={"kv_cache_memory_bytes": 32 << 20, "block_size": 32}
    )
    engine = vllm_utils.start(settings)
    yield engine
    engine.shutdown()


@pytest.fixture
def engine(shared):
    shared.wake_up()
    update(shared, A)
    return shared


def weights_of(model):
    return dict(model.named_parameters())


def update(engine, model, bucket_bytes=20_000):
    """As a strategy does it, with memory that is overwritten after each bucket."""
    weights = model if isinstance(model, dict) else weights_of(model)
    return weight_sync.send(engine, weights.items(), bucket_bytes=bucket_bytes, poison=True)


def asked(prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def generate(engine, prompts, params):
    return engine.generate(asked(prompts), params)


def tokens(completions):
    return [completion.output_token_ids for completion in completions]


def expected_tokens(model, prompt, count):
    plain = GenerationConfig(max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=tiny.PAD)
    found = model.generate(torch.tensor([prompt]), generation_config=plain)
    return tuple(found[0, len(prompt) :].tolist())


def log_probs_of(model, completion):
    """What a trainer computes for a completion."""
    ids = torch.tensor([completion.prompt_token_ids + completion.output_token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(completion.prompt_token_ids) - 1 : -1]
    outputs = torch.tensor(completion.output_token_ids)
    return logits.log_softmax(-1).gather(1, outputs[:, None])[:, 0]


def assert_close(completion, expected):
    torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-4, rtol=0)


def assert_is(engine, model):
    """The engine generates as ``model`` does, to the last token and nearly to the last digit."""
    for prompt, found in zip(PROMPTS, generate(engine, PROMPTS, GREEDY), strict=True):
        assert found.prompt_token_ids == tuple(prompt)
        assert_close(found, log_probs_of(model, found))
        assert torch.tensor(found.log_probs).exp().max() > 0.2, "a model that tells tokens apart"


# -- Generation -------------------------------------------------------------------------------------------------------


def test_greedy_completions_are_those_of_transformers(engine):
    completions = generate(engine, PROMPTS, GREEDY)
    assert tokens(completions) == [expected_tokens(A, prompt, 12) for prompt in PROMPTS]
    assert len(set(sum(tokens(completions), ()))) > 8, "not one token over and over"
    for completion in completions:
        assert_close(completion, log_probs_of(A, completion))
        assert completion.weight_version == engine.weight_version
        assert completion.text is None


# -- What is refused --------------------------------------------------------------------------------------------------

OUTSIDE = tiny.VOCABULARY
REFUSED = {
    "empty": ([[]], {}, "cannot be empty"),
    "too long": ([prompt_of(97)], {}, "maximum context length is 96"),
    "outside": ([[5], [5, OUTSIDE]], {}, "prompt 1 has the token id 128: expected ids of 0 to 127"),
    "negative": ([[-1]], {}, "prompt 0 has the token id -1"),
    "bias": ([[5]], {"logit_bias": {OUTSIDE: 1.0}}, "out-of-vocab"),
    "n": ([[5]], {"n": 2, "temperature": 0}, "n=2 with temperature=0"),
    "unknown": ([[5]], {"beam_width": 2}, "vLLM has no beam_width"),
    "stop text": ([[5]], {"stop": "x"}, "stop needs a tokenizer"),
    "bad words": ([[5]], {"bad_words": ["x"]}, "bad_words needs a tokenizer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_generated_is_refused_and_leaves_the_engine_usable(engine, name):
    prompts, params, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        generate(engine, [*PROMPTS, *prompts] if name in ("empty", "too long") else prompts, GREEDY | params)
    assert_is(engine, A)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompt": "text"}, "vLLM refuses the requests: .*okenizer"),
        ({"prompt_token_ids": [5], "multi_modal_data": {"image": "x"}}, "vLLM refuses the requests: .*ulti-?modal"),
    ],
)
def test_what_the_model_cannot_read_is_refused(engine, request_, message):
    with pytest.raises(ConfigError, match=message):
        engine.generate([request_], GREEDY)
    assert_is(engine, A)


def test_f17_an_error_in_the_middle_of_a_batch_leaves_nothing_behind(engine, monkeypatch):
    monkeypatch.setattr(adapter, "check_tokens", lambda requests, vocabulary: None)
    with pytest.raises(IndexError):
        generate(engine, [*PROMPTS, [OUTSIDE]], GREEDY | {"temperature": 1, "n": 2})
    assert_is(engine, A)


def test_f17_an_engine_that_cannot_be_emptied_is_dead(engine, monkeypatch):
    def fails():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine, "_abort", fails)
    monkeypatch.setattr(engine.state, "end", (ended := []).append)
    with pytest.raises(ConfigError, match="cannot be empty"):
        generate(engine, [[]], GREEDY)
    assert ended == ["could not be emptied after a failed generation (out of memory)"]


# -- Weights ----------------------------------------------------------------------------------------------------------


def test_f20_updates_in_turn_are_each_the_same_as_the_first(engine):
    found = {}
    for turn in range(3):
        for name, model in (("B", B), ("A", A)):
            update(engine, model)
            assert_is(engine, model)
            completions = [one.log_probs for one in generate(engine, PROMPTS, GREEDY)]
            assert found.setdefault(name, completions) == completions, f"turn {turn}: not the same to the last bit"


def test_the_tied_output_layer_may_be_sent_or_not(engine):
    update(engine, {**weights_of(B), "lm_head.weight": B.lm_head.weight})
    assert_is(engine, B)
    with pytest.raises(WeightSyncError, match=r"of another shape: lm_head.weight \(3, 3\), expected \(128, 64\)"):
        update(engine, {**weights_of(B), "lm_head.weight": torch.zeros(3, 3)})


@pytest.mark.parametrize("last", range(len(weights_of(B))))
def test_an_update_that_is_broken_off_anywhere_leaves_no_trace_in_the_next(engine, last):
    def broken():
        yield from list(weights_of(B).items())[:last]
        raise OSError("the gathering failed")

    with pytest.raises(WeightSyncError, match="vLLM has not got new weights: OSError: the gathering failed"):
        weight_sync.send(engine, broken(), bucket_bytes=1)
    assert engine.status is EngineStatus.STALE
    update(engine, A)
    assert_is(engine, A)


def test_an_engine_that_cannot_be_mended_is_dead(engine, monkeypatch):
    def fails(weights):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_reload", fails)
        patch.setattr(engine.state, "end", (ended := []).append)
        with pytest.raises(WeightSyncError, match="vLLM is dead: a failed update could not be ended"):
            update(engine, B)
    assert ended == ["could not be mended after a failed update (out of memory)"]


# -- Sleep ------------------------------------------------------------------------------------------------------------


def test_sleep_at_level_1_keeps_the_weights(engine):
    is_sleeping = engine._llm.llm_engine.is_sleeping
    engine.sleep(level=1)
    engine.sleep(level=1)
    assert is_sleeping()
    assert engine.status is EngineStatus.ASLEEP
    with pytest.raises(EngineStateError, match="asleep"):
        generate(engine, PROMPTS, GREEDY)
    engine.wake_up(["weights"])
    assert is_sleeping()
    assert engine.status is EngineStatus.ASLEEP
    with pytest.raises(EngineStateError, match=r"asleep \(kv_cache still\)"):
        generate(engine, PROMPTS, GREEDY)
    engine.wake_up(["kv_cache"])
    engine.wake_up()
    assert not is_sleeping()
    assert_is(engine, A)
