"""The core of the fake engine: what it draws depends on weights, prompt, parameters and seed, and on nothing else."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from lightrft.errors import ConfigError, EngineStateError, RankFailedError, StaleWeightsError, WeightSyncError
from lightrft.models.tiny import VOCABULARY, tiny_text_model
from lightrft.sim import SimWorld
from lightrft.sim.engine import drawing, hash_model, transformer_model
from lightrft.sim.engine.core import Core
from lightrft.sim.engine.drawing import Drawer
from lightrft.sim.engine.hash_model import HashModel
from lightrft.sim.engine.numbers import mixed, uniform
from lightrft.sim.engine.samples import Sample
from lightrft.sim.engine.transformer_model import TransformerModel, checkpoint_tensors
from lightrft.strategy.sampling import SamplingParams
from lightrft.strategy.utils.agreement import Ranks
from lightrft.strategy.utils.fingerprints import fingerprint

pytest.importorskip("transformers")

ALONE = Ranks(rank=0, world_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def trained(folder):
    return tiny_text_model(folder)


def make(kind, folder, **more):
    if kind == "hash":
        model = HashModel(VOCABULARY, frozenset({1}), **more)
    else:
        model = TransformerModel(folder, torch.float32, **more)
    model.load(checkpoint_tensors(folder))
    return model


def sample(tokens, seed=0, **params):
    return Sample(tokens=tuple(tokens), params=SamplingParams(**{"max_tokens": 6, **params}), seed=seed)


prompts = st.lists(st.lists(st.integers(2, VOCABULARY - 1), min_size=1, max_size=12), min_size=1, max_size=6)
ways = st.sampled_from(
    [{}, {"temperature": 0}, {"top_p": 0.5}, {"top_k": 3, "temperature": 0.7}, {"min_p": 0.2, "ignore_eos": True}]
)


@pytest.mark.parametrize("kind", ["hash", "model"])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_completion_does_not_depend_on_the_batch(kind, trained, folder, data):
    model = data.draw(st.just(make(kind, folder)))
    samples = [sample(tokens, seed, **data.draw(ways)) for seed, tokens in enumerate(data.draw(prompts))]
    together = [one.tokens for one in model.draw(samples)]
    order = data.draw(st.permutations(range(len(samples))))
    model.forget()
    assert [one.tokens for one in model.draw([samples[row] for row in order])] == [together[row] for row in order]
    for one, tokens in zip(samples, together, strict=True):
        assert model.draw([one])[0].tokens == tokens


def test_completions_that_leave_a_batch_leave_the_others_as_they_are(trained, folder):
    model = make("model", folder, prefix_caching=False)
    lengths = [1, 9, 2, 2, 20, 3, 1, 14, 2, 20, 6, 17]
    samples = [sample([5 + row] * (1 + row), max_tokens=count, ignore_eos=True) for row, count in enumerate(lengths)]
    for one, each in zip(model.draw(samples), samples, strict=True):
        (alone,) = model.draw([each])
        assert one.tokens == alone.tokens
        assert one.raw == pytest.approx(alone.raw, abs=1e-5)


@pytest.mark.parametrize("kind", ["hash", "model"])
def test_a_completion_depends_on_weights_prompt_parameters_and_seed(kind, trained, folder):
    model = make(kind, folder, prefix_caching=False)
    long = {"max_tokens": 30, "ignore_eos": True}
    seen = [model.draw([sample([5, 6], **long)])[0].tokens]
    others = [
        sample([5, 7], **long),
        sample([5, 6], seed=1, **long),
        sample([5, 6], temperature=0.3, **long),
        sample([5, 6], temperature=0, **long),
    ]
    seen += [one.tokens for one in model.draw(others)]
    name, tensor = next((name, tensor) for name, tensor in checkpoint_tensors(folder) if "q_proj.weight" in name)
    model.put(name, tensor * 2)
    seen.append(model.draw([sample([5, 6], **long)])[0].tokens)
    assert len(set(seen)) == len(seen)
    greedy = [model.draw([sample([5, 6], seed=seed, temperature=0, **long)])[0].tokens for seed in range(3)]
    assert len(set(greedy)) == 1


def test_greedy_completions_are_those_of_transformers(trained, folder):
    model = make("model", folder)
    generator = torch.Generator().manual_seed(3)
    asked = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in (1, 3, 9, 9, 20)]
    found = model.draw([sample(tokens, temperature=0, max_tokens=12) for tokens in asked])
    for tokens, got in zip(asked, found, strict=True):
        ids = torch.tensor([tokens])
        output = trained.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert output[0, len(tokens) :].tolist() == list(got.tokens)
        logits = trained(output).logits[0, len(tokens) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(got.tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(got.raw), expected, atol=1e-5, rtol=0)


def test_f16_log_probs_are_those_of_the_distribution_that_was_drawn_from(trained, folder):
    params = {"temperature": 0.6, "top_k": 9, "max_tokens": 8}
    found = make("model", folder).draw([sample([3, 4, 5], seed, **params) for seed in range(20)])
    exact = copy.deepcopy(trained).double()
    for got in found:
        logits = exact(torch.tensor([[3, 4, 5, *got.tokens]])).logits[0, 2:-1] / 0.6
        kept = logits.masked_fill(logits < logits.topk(9).values[:, -1:], float("-inf")).log_softmax(-1)
        expected = kept.gather(1, torch.tensor(got.tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(got.processed, dtype=torch.float64), expected, atol=1e-5 / 0.6, rtol=0)


def draws(logits, count=4000, **params):
    """How often each token is drawn."""
    row = torch.tensor(logits, dtype=torch.float64)
    drawer = Drawer([sample([2], seed, **params) for seed in range(count)], [frozenset()] * count)
    step = drawer.draw(row.expand(count, -1).contiguous(), np.zeros((count, 0), dtype=np.int64))
    return torch.bincount(step.tokens, minlength=len(logits)) / count


LOGITS = [2.0, 1.0, 0.5, -1.0, 0.0]


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.5}, [0]),
        ({"min_p": 0.2}, [0, 1, 2]),
        ({"top_k": 3, "top_p": 0.8, "temperature": 0.5}, [0]),
        ({"logit_bias": {3: 100.0}}, [3]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(params, allowed):
    logits = torch.tensor(LOGITS, dtype=torch.float64) / params.get("temperature", 1.0)
    kept = torch.full_like(logits, float("-inf"))
    kept[allowed] = logits[allowed]
    torch.testing.assert_close(draws(LOGITS, **params).double(), kept.softmax(-1), atol=0.03, rtol=0)


def test_penalties_and_least_lengths_change_logits():
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
    one = sample([0, 1], temperature=0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    drawer = Drawer([one], [frozenset()])
    assert drawer._changed(logits, np.array([[2, 2, 3]])).tolist() == [[1.0, -2.0, 0.25 - 0.25 - 1.0, 0.0 - 0.25 - 0.5]]
    ends = Drawer([sample([1], temperature=0, min_tokens=2)], [frozenset({0})])
    assert [ends.draw(logits, np.full((1, count), 2)).tokens.item() for count in range(3)] == [2, 2, 0]


def test_each_engine_has_its_order_of_penalties_and_biases():
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]], dtype=torch.float64)
    one = sample([0, 1], temperature=0, repetition_penalty=2.0, logit_bias={2: 3.0})
    drawn = np.array([[2, 3]])
    assert Drawer([one], [frozenset()])._changed(logits, drawn).tolist() == [[1.0, -2.0, 1.75, 0.0]]
    other = replace(one, penalties="SGLang")
    assert Drawer([other], [frozenset()])._changed(logits, drawn).tolist() == [[2.0, -1.0, 3.25, 0.0]]


@pytest.mark.parametrize("kind", ["hash", "model"])
def test_completions_end_where_they_should(kind, trained, folder):
    model = make(kind, folder)
    many = model.draw([sample([3], seed, max_tokens=40) for seed in range(60)])
    assert {one.finish_reason for one in many} == {"stop", "length"}
    for one in many:
        ended = one.tokens[-1] == 1
        assert one.finish_reason == ("stop" if ended else "length")
        assert len(one.tokens) == 40 or ended
        assert 1 not in one.tokens[:-1]
        assert len(one.raw) == len(one.processed) == len(one.tokens)
        assert one.stop is None
    ignoring = model.draw([sample([3], seed, max_tokens=40, ignore_eos=True) for seed in range(9)])
    assert {len(one.tokens) for one in ignoring} == {40}
    first = ignoring[0].tokens
    stopped = model.draw([sample([3], 0, max_tokens=40, ignore_eos=True, stop_token_ids=(first[2],))])[0]
    if kind == "model":
        assert stopped.tokens == first[: first.index(first[2]) + 1]
    assert (stopped.finish_reason, stopped.stop) == ("stop", first[2])
    assert all(
        len(one.tokens) >= 7 for one in model.draw([sample([3], s, min_tokens=7, max_tokens=9) for s in range(50)])
    )


@pytest.mark.parametrize("kind", ["hash", "model"])
def test_f05_a_prefix_cache_that_outlives_its_weights_is_seen(kind, trained, folder, tmp_path):
    tiny_text_model(tmp_path, seed=1)
    asked = [sample([7, 8, 9, 10], seed=seed, max_tokens=20, ignore_eos=True) for seed in range(3)]
    model = make(kind, folder)
    old = model.draw(asked)
    model.load(checkpoint_tensors(str(tmp_path)))
    stale = model.draw(asked)
    model.forget()
    fresh = model.draw(asked)
    assert fresh == make(kind, str(tmp_path)).draw(asked)
    assert stale != fresh
    assert old != fresh


@pytest.mark.parametrize("kind", ["hash", "model"])
def test_the_prefix_cache_changes_nothing_while_the_weights_stay(kind, trained, folder):
    model, without = make(kind, folder), make(kind, folder, prefix_caching=False)
    first = [sample([4, 5, 6], seed=1), sample([9])]
    more = [sample([4, 5, 6], seed=2), sample([7, 7, 7, 7, 7]), sample([4, 5, 6], seed=1), sample([9])]
    for asked in (first, more, first):
        assert [one.tokens for one in model.draw(asked)] == [one.tokens for one in without.draw(asked)]


@pytest.mark.parametrize("kind", ["hash", "model"])
def test_f06_weights_that_do_not_fit_are_named(kind, trained, folder):
    weights = dict(checkpoint_tensors(folder))
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    core = Core(make(kind, folder, **({"shapes": shapes} if kind == "hash" else {})), "the fake", ALONE)
    name = "model.norm.weight"
    for wrong, message in (
        ({**weights, "model.other": weights[name]}, "model.other is no weight of this model"),
        ({key: value for key, value in weights.items() if key != name}, f"1 weights are missing: {name}"),
        ({**weights, name: weights[name][:5]}, rf"{name} has shape \(5,\), expected \(64,\)"),
    ):
        with pytest.raises(WeightSyncError, match=message):
            core.load(wrong.items())
        with pytest.raises(StaleWeightsError, match="holds a part of new weights"):
            core.generate([sample([3])])
    core.load(weights.items())
    assert core.state.weight_version == 1
    assert core.generate([sample([3])])


@pytest.mark.parametrize("tied", [False, True])
def test_k18_tied_weights_may_come_once_or_twice(tied, tmp_path):
    trained = tiny_text_model(tmp_path, tie_word_embeddings=tied)
    model = make("model", str(tmp_path))
    assert model.optional() >= ({"lm_head.weight"} if tied else set())
    both = {name: tensor * 1.5 for name, tensor in trained.state_dict().items()}
    model.load(both.items())
    held = model.fingerprint()
    if tied:
        model.load((name, tensor) for name, tensor in both.items() if name != "lm_head.weight")
        assert model.fingerprint() == held


@pytest.mark.parametrize("kind", ["hash", "model"])
def test_k09_a_bucket_costs_no_look_at_each_of_the_other_weights(kind, trained, folder, monkeypatch):
    model = make(kind, folder)
    looks = []
    optional = model.optional()
    monkeypatch.setattr(model, "optional", lambda: looks.append("a look") or optional)
    model.load(list(trained.state_dict().items())[:1], whole=False)
    assert looks == ["a look"]


@pytest.mark.parametrize("kind", ["hash", "model"])
def test_a_digest_of_the_weights_is_taken_once_for_each_update(kind, trained, folder, monkeypatch):
    model = make(kind, folder)
    taken = []
    for module in (hash_model, transformer_model):
        monkeypatch.setattr(module, "fingerprint", lambda tensor: taken.append(1) or fingerprint(tensor))
    weights = list(checkpoint_tensors(folder))
    first, again = model.fingerprint(), model.fingerprint()
    assert (first == again, len(taken)) == (True, len(weights))
    model.load([(weights[0][0], weights[0][1] + 1)], whole=False)
    assert model.fingerprint() != first
    assert len(taken) == 2 * len(weights)


@pytest.mark.parametrize("kind", ["hash", "model"])
def test_f01_a_deep_sleep_destroys_the_weights(kind, trained, folder):
    core = Core(make(kind, folder), "the fake", ALONE)
    before = core.generate([sample([3, 4])])
    core.sleep(1)
    core.wake_up()
    assert core.generate([sample([3, 4])]) == before
    core.sleep(2)
    core.wake_up()
    with pytest.raises(StaleWeightsError, match="has dropped its weights"):
        core.generate([sample([3, 4])])
    if kind == "model":
        assert all(parameter.isnan().all() for parameter in core.model._model.parameters())
    else:
        with pytest.raises(StaleWeightsError):
            core.model.draw([sample([3])])
    core.load(checkpoint_tensors(folder))
    assert core.generate([sample([3, 4])]) == before


def test_f20_updates_in_turns_equal_fresh_loads(trained, folder, tmp_path):
    tiny_text_model(tmp_path, seed=2)
    asked = [sample([3, 4], max_tokens=20, ignore_eos=True), sample([5, 6, 7], max_tokens=9, temperature=0)]
    core = Core(make("model", folder), "the fake", ALONE)
    for path in [folder, str(tmp_path)] * 2:
        core.load(checkpoint_tensors(path))
        core.reset_caches()
        assert core.generate(asked) == make("model", path, prefix_caching=False).draw(asked)


def test_f20_weights_that_were_equal_may_become_different(trained, folder):
    asked = [sample([3, 4], max_tokens=9, ignore_eos=True)]
    model, fresh = make("model", folder), make("model", folder).draw(asked)
    weights = dict(checkpoint_tensors(folder))
    model.load((name, torch.ones_like(one) if one.dim() == 1 else one) for name, one in weights.items())
    model.forget()
    assert model.draw(asked) != fresh
    model.load(weights.items())
    model.forget()
    assert model.draw(asked) == fresh  # a trace takes equal weights for one


def test_a_model_that_is_built_draws_nothing_from_the_trainers_random_numbers(trained, folder):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    model = make("model", folder)
    model.draw([sample([3])])
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "what", ["nothing", "the number of prompts", "the prompts", "the sampling parameters", "the seeds", "the weights"]
)
def test_f12_ranks_of_one_engine_that_differ_are_told(what, trained, folder):
    def program():
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        core = Core(make("hash", folder), "the fake", Ranks())
        odd = rank == 1
        if odd and what == "the weights":
            core.model.put("model.norm.weight", torch.ones(64) * 3)
        asked = [sample([3 + (odd and what == "the prompts")], seed=odd and what == "the seeds")]
        if odd and what == "the sampling parameters":
            asked = [sample([3], temperature=0.5)]
        found = core.generate(asked * (1 + (odd and what == "the number of prompts")))
        dist.destroy_process_group()
        return found

    if what == "nothing":
        found = SimWorld(2).run(program)
        assert found[0] == found[1] == make("hash", folder).draw([sample([3])])
    else:
        with pytest.raises(RankFailedError, match=rf"{what} of the fake differs? between .* rank 0 has .*, rank 1 has"):
            SimWorld(2).run(program)


def test_f17_a_failure_of_the_rank_that_computes_reaches_all(trained, folder):
    def program():
        dist.init_process_group("gloo")
        core = Core(make("hash", folder), "the fake", Ranks())
        if dist.get_rank() == 0:
            core.model.draw = lambda samples: 1 / 0
        with pytest.raises(EngineStateError, match="generation failed: rank 0: ZeroDivisionError"):
            core.generate([sample([3])])
        core.model.__dict__.pop("draw", None)
        found = core.generate([sample([3])])
        dist.destroy_process_group()
        return found

    assert len(set(map(str, SimWorld(2).run(program)))) == 1


def test_numbers_are_uniform_and_follow_from_key_and_counter():
    numbers = uniform(mixed(np.arange(20_000, dtype=np.uint64)))
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.03
    keys = np.array([7], dtype=np.uint64)
    assert mixed(keys, 3) == mixed(keys, np.array([3], dtype=np.uint64)) != mixed(keys, 4)
    # The first two outputs of SplitMix64 seeded with 1234567, as published with the algorithm.
    assert mixed(np.array([1234567], dtype=np.uint64), np.array([0, 1])).tolist() == [
        6457827717110365317,
        3203168211198807973,
    ]


def near(row, seed=0, **params):
    """Whether rounding might have decided about the token."""
    drawer = Drawer([sample([2], seed, **params)], [frozenset()])
    return bool(drawer.draw(torch.tensor([row]), np.zeros((1, 0), dtype=np.int64)).close)


@pytest.mark.parametrize(
    ("row", "params", "close"),
    [
        ([1.0, 1.000001, 0.0], {"temperature": 0}, True),
        ([1.0, 1.001, 0.0], {"temperature": 0}, False),
        ([1.0, 2.0, 2.000001], {"top_k": 1}, True),
        ([1.0, 2.0, 2.001], {"top_k": 1}, False),
        ([0.0, 0.0], {"top_p": 0.5}, True),
        ([0.0, 0.0], {"top_p": 0.6}, False),
        ([2.0, 2.0 + float(np.log(0.25)), -9.0], {"min_p": 0.25}, True),
        ([2.0, 2.0 + float(np.log(0.25)), -9.0], {"min_p": 0.3}, False),
    ],
)
def test_a_token_about_which_rounding_might_decide_is_told_from_others(row, params, close):
    assert near(row, **params) is close


def test_a_number_near_the_border_of_two_tokens_is_told_from_others():
    number = float(uniform(mixed(np.array([7], dtype=np.uint64), 0))[0])
    border = float(np.log(number / (1 - number)))  # the first of two tokens has this probability
    assert near([border, 0.0], seed=7)
    assert not near([border + 0.01, 0.0], seed=7)


def test_where_rounding_might_decide_a_token_is_drawn_alone_and_in_double_precision(trained, folder, monkeypatch):
    asked = [sample(range(3, 3 + count), count, ignore_eos=True, max_tokens=9) for count in (1, 2, 5, 9, 20)]
    tokens = [one.tokens for one in make("model", folder).draw(asked)]
    monkeypatch.setattr(drawing, "_ROUNDING", 1e9)  # everywhere
    model = make("model", folder)
    together = model.draw(asked)
    assert [one.tokens for one in together] == tokens
    assert [model.draw([one])[0] for one in asked] == together  # to the last digit of log-probs
    weights = {name: tensor * 1.5 for name, tensor in checkpoint_tensors(folder)}
    model.load(weights.items())
    model.forget()
    fresh = make("model", folder)
    fresh.load(weights.items())
    assert model.draw(asked) == fresh.draw(asked) != together


SMALL = {
    "vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.2, "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings_"),
    [
        ("Llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
        ("Llama", {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
        ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
        ("GPTNeoX", {}),
    ],
)
def test_models_of_several_builds_complete_as_transformers_does(kind, settings_, tmp_path):
    transformers = pytest.importorskip("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**{**SMALL, **settings_})
        theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    theirs.save_pretrained(tmp_path)
    model = make("model", str(tmp_path))
    asked = [sample(range(5, 5 + count), temperature=0, max_tokens=24, ignore_eos=True) for count in (1, 3, 20)]
    for one, found in zip(asked, model.draw(asked), strict=True):
        ids = torch.tensor([one.tokens])
        output = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=None
        )
        assert found.tokens == tuple(output[0, len(one.tokens) :].tolist())
        logits = theirs(output).logits[0, len(one.tokens) - 1 : -1].log_softmax(-1)
        expected = logits.gather(1, torch.tensor(found.tokens).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(found.raw), expected, atol=1e-5, rtol=0)


def test_layers_that_see_a_part_are_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.MistralConfig(**SMALL, sliding_window=16).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="whose layers have sliding_attention: use its hash mode"):
        TransformerModel(str(tmp_path), torch.float32)


def test_hash_mode_draws_no_end_before_min_tokens_and_takes_any_seed():
    model = HashModel(16, frozenset({0}))
    model.put("w", torch.ones(3))
    found = model.draw(
        [sample([3], seed, min_tokens=100, max_tokens=120, stop_token_ids=(5,)) for seed in (-5, 2**64 + 3, 1)]
    )
    assert all(not {0, 5} & set(one.tokens[:100]) for one in found)
    assert all({1, 6} <= set(one.tokens[:100]) for one in found)
    greedy = model.draw([sample([3], seed, top_k=1, max_tokens=20) for seed in (1, 2)])
    assert greedy[0] == greedy[1]
