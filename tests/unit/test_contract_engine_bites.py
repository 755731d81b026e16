"""Engines that are wrong in one way each are caught by the contracts, with a message that says what is wrong."""

import pytest
from engines import on_cpu
from programs import breakages as strategies
from programs import engine_breakages as broken

from lightrft.models import tiny
from lightrft.sim import SimWorld
from lightrft.sim.contracts import engine as engine_contract
from lightrft.sim.contracts import weight_sync as weight_sync_contract
from lightrft.sim.contracts.engine import sharing
from lightrft.sim.engine import core
from lightrft.sim.engine.faces import faces
from lightrft.sim.engine.vllm_face import llm
from lightrft.sim.engine.weights import Weights
from lightrft.strategy import coverage, engine, engine_state, model_files, sampling, weight_sync
from lightrft.strategy.utils import adapters, checkpoint_form
from lightrft.strategy.vllm_utils import engine as adapter

pytest.importorskip("transformers")

CHECK = {check.number: check for check in (*engine_contract.CHECKS, *weight_sync_contract.CHECKS)}
State, Stateful, Engine = engine_state.EngineState, engine.StatefulEngine, adapter.VLLMEngine
Coverage, Files = coverage.Coverage, model_files.ModelFiles

MUTATIONS = {
    # what is wrong: the check that sees it, its message, and of each thing that is replaced the owner, the name, and
    # how the original becomes the broken one
    "other tokens come back": (
        "EN101", "was completed by .*, and the model says",
        (adapter, "completions_of", broken.completed(output_token_ids=lambda one: one.output_token_ids[::-1])),
    ),
    "log-probs are said to be raw": (
        "EN102", "at temperature 0.5 raw log-probs are .* off", (adapter, "log_probs_mode", broken.returns("raw")),
    ),
    "completions come backwards": ("EN103", "in another order", (Engine, "_generate", broken.backwards)),
    "there are no log-probs": (
        "EN104", "logprobs=0 gave None for",
        (adapter, "completions_of", broken.completed(log_probs=lambda one: None)),
    ),
    "everything stops": (
        "EN105", "8 tokens and 'stop', expected 8 and 'length'",
        (adapter, "completions_of", broken.completed(finish_reason=lambda one: "stop")),
    ),
    "tokens that stop do not": (
        "EN106", r"\(.*\), expected \(", (adapter, "sampling_for", broken.replaced(stop_token_ids=())),
    ),
    "tokens that stop do not without the end": (
        "EN107", "it ended by 'length'",
        (adapter, "sampling_for", broken.drawn_with(broken.without_stops_beyond_the_end)),
    ),
    "the end comes too early": ("EN108", "min_tokens=3 ended after", (
        adapter, "sampling_for", broken.replaced(min_tokens=0)),
    ),
    "the length is that of the library": (
        "EN109", "max_tokens=None gave 16 tokens", (adapter, "sampling_for", broken.drawn_with(broken.sixteen)),
    ),
    "anything is a request": (
        "EN110", "expected ConfigError, and it returned", (engine, "request_of", broken.anything_is_a_request),
    ),
    "something comes of nothing": (
        "EN111", "completions came of no requests", (Stateful, "generate", broken.one_request_at_least),
    ),
    "tokens are numbers of NumPy": (
        "EN112", "numpy.int64.*, expected int",
        (adapter, "completions_of", broken.completed(output_token_ids=broken.numbers_of_numpy)),
    ),
    "there is no text": (
        "EN113", "the text is None", (adapter, "completions_of", broken.completed(text=lambda one: None)),
    ),
    "texts end nothing": ("EN114", "by 'length', expected", (adapter, "sampling_for", broken.replaced(stop=()))),
    "bad prompts are left out": (
        "EN115", "expected ConfigError, and it returned", (Stateful, "generate", broken.bad_ones_left_out),
    ),
    "names of SGLang are not known": (
        "EN201", "has no max_new_tokens", (sampling, "_SYNONYMS", lambda original: {}),
    ),
    "unknown options are left out": (
        "EN202", "expected ConfigError, and it returned", (sampling, "_made", broken.unknown_options_left_out),
    ),
    "temperatures are passed over": (
        "EN203", "at temperature 0.5 tokens have", (adapter, "sampling_for", broken.replaced(temperature=1.0)),
    ),
    "cuts are passed over": ("EN204", "{'top_k': 2} drew", (adapter, "sampling_for", broken.replaced(top_k=-1))),
    "log-probs are of before the cuts": (
        "EN205", "tokens have the probabilities", (core.Core, "generate", broken.cut_off_later),
    ),
    "penalties are passed over": (
        "EN206", "'presence_penalty': 2.0} gave", (adapter, "sampling_for", broken.replaced(presence_penalty=0.0)),
    ),
    "seeds count nothing": ("EN301", "seed=5 gave", (adapter, "seeds_for", broken.counted)),
    "seeds are of places": ("EN302", "alone, and by", (adapter, "seeds_for", broken.by_place)),
    "equal prompts have equal seeds": (
        "EN303", "both were completed by", (adapter, "seeds_for", broken.by_content_alone),
    ),
    "samples have one seed": (
        "EN304", "six samples are", (llm.LLM, "_seed", lambda f: lambda self, params, index: f(self, params, 0)),
    ),
    "no seed is a seed": ("EN305", "two calls gave", (Engine, "_generate", broken.always_seed_0)),
    "nothing is greedy": (
        "EN306", "seeds None, None, 7 and 8 gave", (adapter, "sampling_for", broken.drawn_with(broken.never_greedy)),
    ),
    "the generator of the trainer is drawn from": (
        "EN307", "update_weights has drawn", (Engine, "_load", broken.draws_a_number),
    ),
    "versions begin at 1": ("EN401", "it has version 1", (State, "__init__", broken.begins_at_1)),
    "no line is named": ("EN402", "expected 2 places", (engine_state, "call_site", broken.returns("somewhere"))),
    "a deep sleep is a light one": (
        "EN403", r"awake after sleep\(2\) it is awake", (State, "sleep", broken.as_level_1),
    ),
    "an update wakes": (
        "EN404", "expected EngineStateError, and it returned", (Stateful, "update_weights", broken.woken_first),
    ),
    "all wakes at once": ("EN405", "with weights awake alone it is awake", (State, "wake_up", broken.wholly)),
    "waking up twice is an error": ("EN406", "it is awake already", (State, "wake_up", broken.once_only)),
    "any level will do": ("EN407", "expected ConfigError, and it returned", (State, "sleep", broken.any_level)),
    "caches are reset awake alone": ("EN408", "it sleeps", (Stateful, "reset_caches", broken.awake_only)),
    "failures count versions": (
        "EN409", r"after .*update, broken: \(.*\), expected", (State, "update", broken.counts_failures),
    ),
    "weights are read and not loaded": (
        "EN501", "does not hold the weights that it should", (Engine, "_load", broken.reads_only),
    ),
    "any version will do": ("EN502", "expected EngineStateError, and it returned", (
        State, "update", broken.any_version),
    ),
    "caches outlive weights": ("EN503", "does not hold the weights", (Engine, "_reset_caches", broken.returns(None))),
    "any dtype will do": ("EN504", "expected WeightSyncError, and it returned", (Coverage, "fits", broken.any_dtype)),
    "a failed update leaves it awake": ("EN504", "it is awake at", (State, "update", broken.forgives_failures)),
    "weights may come twice": (
        "EN505", "expected WeightSyncError, and it returned", (Coverage, "fits", broken.forgetful),
    ),
    "errors of the source are swallowed": (
        "EN506", "the error of the source is not told", (Engine, "_load", broken.swallows),
    ),
    "what was sent is kept": ("EN507", "are off by nan", (Weights, "put", broken.aliased)),
    "gradients are off in the source": (
        "EN508", "buckets were gathered with", (Engine, "_load", broken.without_gradients),
    ),
    "other moves are made during an update": (
        "EN509", "expected EngineStateError, and it returned", (State, "check", broken.dead_or_not),
    ),
    "ranks get other completions": (
        "EN601", "ranks got the completions of", (sharing, "gather_and_generate", broken.backwards),
    ),
    "ranks may differ": (
        "EN602", "expected an error",
        (Engine, "_check_same", broken.returns(None)), (core.Core, "_check_same", broken.returns(None)),
    ),
    "an error stays with its rank": (
        "EN603", "the ranks got 'nothing' and", (sharing, "gather_and_generate", broken.silent_on_rank_0),
    ),
    "one rank is a version ahead": ("EN604", "versions are", (State, "update", broken.ahead_on_rank_1)),
    "an update that fails stays with its rank": (
        "EN605", "rank 0 got 'nothing', expected a WeightSyncError", (sharing._Rank, "send", broken.silent_on_rank_0),
    ),
    "the end takes the group": (
        "EN606", "process group has not been initialized", (Engine, "_shutdown", broken.with_the_group),
    ),
    "nothing ends": ("EN701", "refused without saying what to do", (Stateful, "shutdown", broken.returns(None))),
    "it does not say who calls it": (
        "EN702", "runs_on_all_ranks is None", (Engine, "runs_on_all_ranks", broken.says(None)),
    ),
    "one weight arrives otherwise": (
        "WS101", "does not hold the weights", (adapter, "_fit", broken.halves("model.norm.weight")),
    ),
    "a tied output layer is refused": (
        "WS102", "unexpected: lm_head.weight", (Files, "copies_of_the_embedding", broken.returns({})),
    ),
    "one dtype is taken": ("WS103", "of another dtype", (Coverage, "fits", broken.single_dtype)),
    "dtypes are passed over": (
        "WS103", "sent with dtype=bfloat16", (weight_sync, "in_buckets", broken.dtype_left_out),
    ),
    "names are those of the trainer": (
        "WS104", "unexpected: actor.model", (checkpoint_form, "savable", broken.outermost),
    ),
    "adapters are left out": ("WS105", "does not hold the weights", (adapters._Sum, "value", broken.not_merged)),
    "all buckets are kept": ("WS201", "bytes of gathered weights were kept", (adapter, "_fit", broken.keeping)),
    "all buckets are gathered first": (
        "WS201", "bytes of gathered weights were kept", (Engine, "_load", broken.keeps_buckets),
    ),
    "weights are not copied": ("WS202", "are off by nan", (Weights, "put", broken.aliased)),
    "every weight is a bucket": (
        "WS203", "buckets for twice as much", (weight_sync, "in_buckets", broken.one_by_one),
    ),
    "versions run ahead": ("WS204", "the versions are", (State, "update", broken.one_further)),
    "caches stay after sending": (
        "WS205", "does not hold the weights", (weight_sync, "send", strategies.without_reset),
    ),
    "gathering ends with the engine": (
        "WS301", "weights of .* were gathered", (weight_sync, "send", broken.not_drained),
    ),
    "gathering ends with the sleep": (
        "WS302", "weights of .* were gathered", (weight_sync, "send", broken.not_drained),
    ),
    "names may collide": (
        "WS303", "expected WeightSyncError, and it returned", (weight_sync, "_noted", broken.names_may_collide),
    ),
    "it tells something else": (
        "WS401", "it holds others than were sent: .*norm", (Engine, "_fingerprints", broken.returns({})),
    ),
    "nothing is compared": (
        "WS402", "expected WeightSyncError, and it returned", (weight_sync, "_compare", broken.returns(None)),
    ),
    "wrong weights are left to it": (
        "WS402", "arrived otherwise, and the engine is awake", (Engine, "spoil", broken.returns(None)),
    ),
    "nothing is verified": (
        "WS403", "expected ConfigError, and it returned", (weight_sync, "send", broken.never_verified),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return on_cpu.pair(tie_word_embeddings=True)


@pytest.fixture(scope="module")
def remembered():
    return {}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    return [on_cpu.save(model, tmp_path_factory.mktemp("model"), tiny.tokenizer()) for model in models]


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_engine_is_caught(wrong, models, folders, remembered, monkeypatch):
    number, message, *replaced = MUTATIONS[wrong]

    def start(index):
        return on_cpu.counting(adapter.start(on_cpu.settings(folders[index])))

    def start_shared(group):
        return adapter.start(on_cpu.settings(folders[0], tp_size=2, group=group))

    monkeypatch.setenv("LIGHTRFT_POISON_BUCKETS", "1")  # as in a world
    for owner, name, make in replaced:
        monkeypatch.setattr(owner, name, make(getattr(owner, name, None)))
    mode = "hash" if number.startswith("EN6") else "model"  # a world of two ranks takes its time
    with faces(mode):
        subject = on_cpu.subject(
            "fake vLLM" if mode == "model" else "fake vLLM, hash mode",
            start,
            models,
            world=lambda size: SimWorld(size, engines=mode, stall_limit=15),
            start_shared=start_shared,
            remembered=remembered if mode == "model" else {},
        )
        with pytest.raises(Exception, match=f"(?s){message}") as caught:
            CHECK[number](subject)
    assert any(number in note for note in getattr(caught.value, "__notes__", ())), "it is the check that sees it"


def test_every_check_sees_something():
    assert {number for number, *_ in MUTATIONS.values()} == CHECK.keys()
