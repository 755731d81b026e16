"""The fake engine behind the face of vLLM, and vLLM itself, live through the same and do the same."""

from collections import Counter

import pytest
import torch
from engines import on_cpu
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightrft.errors import LightRFTError
from lightrft.models import tiny
from lightrft.sim.engine.faces import faces
from lightrft.strategy import vllm_utils, weight_sync

# What vLLM and what it imports warn of is not ours.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::lightrft")]

SCENARIOS = 500
MODELS = on_cpu.pair(tie_word_embeddings=True)
WEIGHTS = [dict(model.named_parameters()) for model in MODELS]
NAMES = list(WEIGHTS[0])
OPTIONS = {"kv_cache_memory_bytes": 32 << 20, "block_size": 32}
NEAR = 1e-3
"""Log-probs of tokens of which either may come first."""

tokens = st.integers(len(tiny.SPECIAL), tiny.VOCABULARY - 1)
prompts = st.lists(st.lists(tokens, min_size=1, max_size=40), min_size=1, max_size=4)
bad_prompts = st.sampled_from(
    [[], [tiny.VOCABULARY], [-1], [7] * on_cpu.LENGTH, [7] * (on_cpu.LENGTH + 1), [7] * (on_cpu.LENGTH - 1)]
)
greedy = st.fixed_dictionaries(
    {"temperature": st.just(0), "logprobs": st.just(0)},
    optional={
        "max_tokens": st.integers(1, 12),
        "ignore_eos": st.booleans(),
        "min_tokens": st.integers(0, 4),
        "stop_token_ids": st.lists(tokens, max_size=20),
        "stop": st.sampled_from(["a", ["b", "cd"], []]),
        "logit_bias": st.dictionaries(st.integers(0, tiny.VOCABULARY - 1), st.floats(-5, 5, width=16), max_size=3),
        "presence_penalty": st.sampled_from([-1.0, 0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-1.0, 0.5, 2.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.3, 3.0]),
        "seed": st.integers(0, 9),
        "skip_special_tokens": st.booleans(),
        "include_stop_str_in_output": st.booleans(),
    },
)
drawn = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.3, 1.0, 2.0]), "ignore_eos": st.just(True), "max_tokens": st.integers(1, 6)},
    optional={
        "n": st.integers(1, 3),
        "seed": st.integers(0, 9),
        "top_k": st.sampled_from([-1, 0, 1, 5]),
        "top_p": st.sampled_from([0.3, 1.0]),
        "min_p": st.sampled_from([0.0, 0.2]),
        "logprobs": st.sampled_from([None, 0, 1]),
    },
)
wrong = st.sampled_from(
    [
        {"n": 0}, {"n": 2}, {"temperature": -1}, {"temperature": 2.5, "n": 2}, {"top_p": 0}, {"top_k": -3},
        {"min_p": 2}, {"max_tokens": 0}, {"max_tokens": 10_000}, {"min_tokens": 100}, {"repetition_penalty": 0},
        {"presence_penalty": 2.5}, {"stop": ""}, {"stop_token_ids": [tiny.VOCABULARY]},
        {"logit_bias": {tiny.VOCABULARY: 1.0}}, {"beam_width": 2}, {"max_tokens": 4, "max_new_tokens": 4},
    ]
).map(lambda params: {"temperature": 0, "logprobs": 0, **params})  # fmt: skip
steps = st.lists(
    st.one_of(
        st.tuples(st.just("generate"), prompts, greedy),
        st.tuples(st.just("generate"), prompts, drawn),
        st.tuples(st.just("generate"), prompts, wrong),
        st.tuples(st.just("generate, bad"), bad_prompts, greedy),
        st.tuples(st.just("update"), st.integers(0, 1), st.sampled_from(["whole", "whole", "whole", "missing"])),
        st.tuples(
            st.just("update"),
            st.integers(0, 1),
            st.sampled_from(["foreign", "shape", "dtype", "bfloat16", "twice", "fails", "head", "late"]),
        ),
        st.tuples(st.just("sleep"), st.sampled_from([1, 2, 1, 2, 3])),
        st.tuples(st.just("wake_up"), st.sampled_from([None, None, ["weights"], ["kv_cache"], ["weights", "x"]])),
        st.tuples(st.just("reset_caches")),
    ),
    min_size=1,
    max_size=10,
)


class Pair:
    """The fake engine and the real one.

    Attributes:
        seen: how often which step came to which end.
    """

    def __init__(self, folder):
        given = on_cpu.settings(folder, options=OPTIONS)
        with faces("model"):
            self.fake = vllm_utils.start(given)
        self.real = vllm_utils.start(given)
        self.seen = Counter()

    def start_over(self):
        for engine in (self.fake, self.real):
            engine.wake_up()
            weight_sync.send(engine, WEIGHTS[0].items(), bucket_bytes=1 << 20)

    def close(self):
        self.fake.shutdown()
        self.real.shutdown()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    made = Pair(on_cpu.save(MODELS[0], tmp_path_factory.mktemp("model"), tiny.tokenizer()))
    yield made
    made.close()


def weights(index, how):
    """Weights that are sent, broken in some way."""
    name = NAMES[5]
    own = dict(WEIGHTS[index])
    if how == "missing":
        own.pop(name)
    elif how == "foreign":
        own["extra.weight"] = torch.zeros(2)
    elif how == "shape":
        own[name] = own[name][:-1]
    elif how == "dtype":
        own[name] = own[name].to(torch.int32)
    elif how == "bfloat16":
        own = {each: weight.bfloat16() for each, weight in own.items()}
    elif how == "head":
        own["lm_head.weight"] = own["model.embed_tokens.weight"]
    yield from own.items()
    if how == "twice":
        yield name, own[name]
    if how in ("fails", "late"):
        raise OSError("the disk is gone")


def cut_short(items, how):
    for place, item in enumerate(items):
        if how == "fails" and place == 7:
            raise OSError("the disk is gone")
        yield item


def carry_out(engine, step):
    """What comes of a step: completions, nothing, or the kind of an error."""
    kind, *given = step
    try:
        if kind == "generate":
            asked, params = given
            return engine.generate([{"prompt_token_ids": prompt} for prompt in asked], params)
        if kind == "generate, bad":
            prompt, params = given
            return engine.generate([{"prompt_token_ids": each} for each in ([7, 8], prompt)], params)
        if kind == "update":
            weight_sync.send(engine, cut_short(weights(*given), given[1]), bucket_bytes=20_000, poison=True)
            return None
        getattr(engine, kind)(*given)
    except LightRFTError as error:
        return type(error).__name__
    return None


def state(engine, first):
    return {
        "status": engine.status,
        "asleep": engine.asleep,
        "version": engine.weight_version - first,
        "is_sleeping": engine._llm.llm_engine.is_sleeping(),
    }


def compare(step, fake, real):
    """Completions of both: alike where nothing is drawn, and else as far as they can be."""
    if not isinstance(fake, list) or not isinstance(real, list):
        assert fake == real
        return
    params = step[2]
    assert [one.prompt_token_ids for one in fake] == [one.prompt_token_ids for one in real]
    for mine, theirs in zip(fake, real, strict=True):
        assert mine.log_probs_mode == theirs.log_probs_mode
        assert (mine.log_probs is None) == (theirs.log_probs is None)
        if params["temperature"] > 0:
            assert (len(mine.output_token_ids), mine.finish_reason) == (
                len(theirs.output_token_ids),
                theirs.finish_reason,
            )
            continue
        if first_difference(mine, theirs) is None:
            assert (mine.output_token_ids, mine.finish_reason, mine.text) == (
                theirs.output_token_ids,
                theirs.finish_reason,
                theirs.text,
            )
            assert torch.tensor(mine.log_probs).sub(torch.tensor(theirs.log_probs)).abs().max() < NEAR
        else:
            place = first_difference(mine, theirs)
            both = [one.log_probs[place] if place < len(one.log_probs) else float("nan") for one in (mine, theirs)]
            assert abs(both[0] - both[1]) < NEAR, f"{mine} and {theirs} differ at {place}"


def first_difference(mine, theirs):
    """The place of the first token that differs."""
    several = zip(mine.output_token_ids, theirs.output_token_ids, strict=False)
    return next((place for place, (one, other) in enumerate(several) if one != other), None)


@settings(
    max_examples=SCENARIOS,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(steps)
def test_the_fake_does_what_vllm_does(pair, scenario):
    pair.start_over()
    first = [engine.weight_version for engine in (pair.fake, pair.real)]
    for step in scenario:
        fake, real = (carry_out(engine, step) for engine in (pair.fake, pair.real))
        compare(step, fake, real)
        assert state(pair.fake, first[0]) == state(pair.real, first[1]), step
        pair.seen[step[0], real if isinstance(real, str) else "done"] += 1


def test_scenarios_saw_every_end_of_every_step(pair):
    ends = {(kind, end) for kind, end in pair.seen if end != "done"}
    assert {kind for kind, end in pair.seen if end == "done"} >= {
        "generate", "generate, bad", "update", "sleep", "wake_up", "reset_caches",
    }  # fmt: skip
    assert ends >= {
        ("generate", "ConfigError"), ("generate", "EngineStateError"), ("generate", "StaleWeightsError"),
        ("generate, bad", "ConfigError"), ("update", "WeightSyncError"), ("update", "EngineStateError"),
        ("sleep", "ConfigError"), ("sleep", "EngineStateError"), ("wake_up", "ConfigError"),
    }  # fmt: skip


numbers = st.one_of(
    st.floats(-3, 3, width=16), st.sampled_from([0.0, 1.0, 2.0, float("inf"), float("nan"), 1e-3, 1e-6])
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(-1, 3),
        "presence_penalty": numbers,
        "frequency_penalty": numbers,
        "repetition_penalty": numbers,
        "temperature": numbers,
        "top_p": numbers,
        "top_k": st.integers(-2, 4),
        "min_p": numbers,
        "seed": st.sampled_from([None, -1, 0, 7]),
        "stop": st.sampled_from([None, "", "a", ["a", "b"], ["a", ""], []]),
        "stop_token_ids": st.sampled_from([None, [], [3, 3], ["x"]]),
        "max_tokens": st.sampled_from([None, -1, 0, 1, 16]),
        "min_tokens": st.sampled_from([-1, 0, 1, 17]),
        "logprobs": st.sampled_from([None, -2, -1, 0, 3, True]),
        "detokenize": st.booleans(),
        "ignore_eos": st.booleans(),
    },
)


def made(cls, given_):
    """The fields of an object, or the kind of the error."""
    try:
        found = cls(**given_)
    except Exception as error:  # noqa: BLE001 - the library has its own kinds
        return type(error).__name__
    return {name: getattr(found, name) for name in (*given_, "top_p", "top_k", "min_p", "temperature", "seed")}


@settings(max_examples=SCENARIOS, deadline=None, derandomize=True, database=None)
@given(fields)
def test_the_fake_takes_the_parameters_that_vllm_takes(pair, given_):
    fake, real = (made(engine.vllm.SamplingParams, given_) for engine in (pair.fake, pair.real))
    assert str(fake) == str(real)  # as text, since a number may be none
