"""Sampling parameters: ours, and what engines make of them."""

import copy
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lightrft.errors import ConfigError
from lightrft.strategy.sampling import SamplingParams


class Vllm:
    """Constructor and attributes as of the engine's class."""

    __module__ = "vllm.sampling_params"

    def __init__(self, n=1, temperature=1.0, max_tokens=16, logprobs=None, seed=None, stop=None, top_k=0, bad_words=()):
        self.__dict__.update({name: value for name, value in locals().items() if name != "self"})
        self._private = "not ours"


class Sglang:
    __module__ = "sglang.srt.sampling.sampling_params"

    def __init__(
        self, max_new_tokens=128, temperature=1.0, n=1, sampling_seed=None, stop=None, regex=None, top_k=1 << 30
    ):
        if regex == "(":
            raise ValueError("unbalanced")
        temperature, top_k = (1.0, 1) if temperature == 0 else (temperature, top_k)
        self.max_new_tokens, self.temperature, self.n, self.top_k = max_new_tokens, temperature, n, top_k
        self.sampling_seed, self.stop_strs, self.regex = sampling_seed, stop, regex


def test_the_names_of_both_engines_mean_the_same():
    ours = SamplingParams(n=2, temperature=0.5, max_tokens=7, seed=3, stop=("a",), logprobs=True)
    plain = {"n": 2, "temperature": 0.5, "seed": 3, "stop": "a", "logprobs": 0}
    assert SamplingParams.of({**plain, "max_tokens": 7}) == ours
    assert SamplingParams.of({**plain, "max_new_tokens": 7}) == ours
    assert SamplingParams.of(Vllm(2, 0.5, 7, logprobs=0, seed=3, stop=["a"])) == ours
    assert SamplingParams.of(ours) is ours
    assert SamplingParams.of(None) == SamplingParams()


@pytest.mark.parametrize("given", [Vllm(3, 0.5, 7, 0, 1, ["a", "b"]), Sglang(7, 0.5, 3, 1, ["a"], regex="x*")])
def test_an_object_comes_back_as_it_was(given):
    params = SamplingParams.of(given)
    if isinstance(given, Vllm):
        assert vars(params.to_vllm(Vllm)) == vars(given)
    else:
        assert vars(Sglang(**params.to_sglang(Sglang))) == vars(given)


@pytest.mark.parametrize("made", [Vllm, Sglang])
@pytest.mark.parametrize("limit", [16, 128, 7])
def test_an_object_keeps_its_limit_of_tokens_also_where_it_is_the_default_of_its_class(made, limit):
    name = "max_tokens" if made is Vllm else "max_new_tokens"
    assert SamplingParams.of(made(**{name: limit})).max_tokens == limit
    assert SamplingParams.of({}).max_tokens is None


@pytest.mark.parametrize("given", [{"temperature": 0}, {"top_k": 1}, {"top_k": 1, "temperature": 0.7}])
def test_a_greedy_object_of_sglang_is_greedy(given):
    assert SamplingParams.of(Sglang(**given)) == SamplingParams(temperature=0, max_tokens=128)
    with pytest.raises(ConfigError, match="n=2 with temperature=0"):
        SamplingParams.of(Sglang(n=2, **given))


def test_what_an_engine_lacks_is_named():
    params = SamplingParams(options={"bad_words": ["x"]}, max_tokens=7)
    assert params.to_vllm(Vllm).bad_words == ["x"]
    with pytest.raises(ConfigError, match="SGLang has no bad_words; it knows max_new_tokens, temperature"):
        params.to_sglang(Sglang)
    with pytest.raises(ConfigError, match="vLLM has no min_p"):
        SamplingParams(min_p=0.5).to_vllm(Vllm)
    with pytest.raises(ConfigError, match="SGLang refuses them: unbalanced"):
        SamplingParams.of({"regex": "("}).to_sglang(Sglang)
    with pytest.raises(ConfigError, match="max_new_tokens is given twice for SGLang"):
        SamplingParams(max_tokens=2, options={"max_new_tokens": 3}).to_sglang(Sglang)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n": 0}, "n=0: expected at least 1"),
        ({"temperature": -1}, "temperature=-1: expected 0 or more"),
        ({"top_p": 0}, "top_p=0: expected above 0, at most 1"),
        ({"top_p": 1.5, "top_k": -2}, "top_p=1.5.*; top_k=-2"),
        ({"max_tokens": 0}, "max_tokens=0: expected at least 1"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens=4: expected 0 to max_tokens"),
        ({"temperature": 0, "n": 2}, "all samples would be the same"),
        ({"options": {"n": 2}}, "options has n, which"),
    ],
)
def test_values_that_cannot_work_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": "0.7"}, "temperature='0.7': expected a number, got str"),
        ({"n": None, "top_p": None}, "n=None: expected an integer, got NoneType; top_p=None: expected a number"),
        ({"n": True}, "n=True: expected an integer, got bool"),
        ({"top_k": 2.5}, "top_k=2.5: expected an integer, got float"),
        ({"max_tokens": "12"}, "max_tokens='12': expected an integer or None, got str"),
        ({"seed": "a"}, "seed='a': expected an integer or None, got str"),
        ({"seed": torch.tensor([1, 2])}, "seed=tensor.*: expected an integer or None, got Tensor"),
        ({"min_p": True}, "min_p=True: expected a number, got bool"),
        ({"ignore_eos": 1}, "ignore_eos=1: expected True or False, got int"),
        ({"logprobs": 0}, "logprobs=0: expected True or False, got int"),
        ({"stop": [3]}, r"stop=\[3\]: expected texts, got list"),
        ({"stop_token_ids": ["3"]}, r"stop_token_ids=\['3'\]: expected token ids, integers, got list"),
        ({"logit_bias": [3]}, r"logit_bias=\[3\]: expected a mapping from token ids to numbers, got list"),
        ({"logit_bias": {"a": 1}}, "logit_bias=.*: expected a mapping from token ids to numbers, got dict"),
        ({"options": [3]}, r"options=\[3\]: expected a mapping, got list"),
    ],
)
def test_values_of_another_type_are_refused(given, message):
    with pytest.raises(ConfigError, match=f"sampling parameters: {message}"):
        SamplingParams(**given)
    if given != {"logprobs": 0}:
        with pytest.raises(ConfigError, match=f"sampling parameters: {message}"):
            SamplingParams.of(given)


def test_numbers_of_numpy_and_torch_become_plain_ones():
    found = SamplingParams(
        n=np.int64(2), temperature=np.float32(0.5), seed=torch.tensor(3), stop_token_ids=torch.tensor([4, 5])
    )
    assert repr(found) == repr(SamplingParams(n=2, temperature=0.5, seed=3, stop_token_ids=(4, 5)))
    assert SamplingParams(stop="a", stop_token_ids=3) == SamplingParams(stop=("a",), stop_token_ids=(3,))
    assert SamplingParams(stop_token_ids={5, 4}).stop_token_ids == (4, 5)


def test_all_tokens_are_minus_one():
    assert SamplingParams(top_k=0) == SamplingParams()
    assert SamplingParams(top_k=0).to_sglang(Sglang) == {}


def test_nothing_that_was_given_can_be_changed_afterwards():
    bias, stop, options = {3: 1.0}, ["a"], {"bad_words": "x"}
    found = SamplingParams(logit_bias=bias, stop=stop, options=options)
    same = copy.deepcopy(found)
    bias[4], options["regex"] = 2.0, "y"
    stop.append("b")
    assert found == same == pickle.loads(pickle.dumps(found))
    assert hash(found) == hash(same)
    assert {SamplingParams(): 1}[SamplingParams()] == 1
    assert SamplingParams(logit_bias={"3": 1}) == SamplingParams(logit_bias={3: 1.0})
    with pytest.raises(TypeError, match="item assignment"):
        found.logit_bias[4] = 1.0


def test_an_engine_gets_lists_and_dicts():
    class Biased:
        def __init__(self, logit_bias, stop):
            self.logit_bias, self.stop = logit_bias, stop

    made = SamplingParams(logit_bias={3: 1.0}, stop="a").to_vllm(Biased)
    assert (type(made.logit_bias), type(made.stop)) == (dict, list)


def test_what_is_none_is_refused():
    with pytest.raises(ConfigError, match="is a SimpleNamespace: expected SamplingParams"):
        SamplingParams.of(SimpleNamespace(n=1))
    with pytest.raises(ConfigError, match="max_new_tokens and max_tokens mean the same"):
        SamplingParams.of({"max_tokens": 1, "max_new_tokens": 2})


def test_no_log_probs_unless_asked_for():
    assert [SamplingParams.of({"logprobs": given}).logprobs for given in (None, False, 0, 1, True)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    for given in ({"logprobs": 5}, {"logprobs": -1}, {"logprobs": "1"}, Vllm(logprobs=3)):
        with pytest.raises(ConfigError, match="logprobs=.*: expected True or False, or 0 or 1, .*only the log-probs"):
            SamplingParams.of(given)
    assert SamplingParams(logprobs=True).to_vllm(Vllm).logprobs == 0
    assert "logprobs" not in SamplingParams(logprobs=True).to_sglang(Sglang)
