"""The adapters of vLLM and SGLang on the fake engine, under every backend: what a trainer's iteration does."""

import gc
import math
import shutil
import time

import pytest
import torch
import torch.distributed as dist

from lightrft.errors import (
    ConfigError,
    EngineStateError,
    LostRanksError,
    RankFailedError,
    StaleWeightsError,
    WeightSyncError,
)
from lightrft.models.tiny import tiny_text_model
from lightrft.sim import SimWorld
from lightrft.sim.engine import core
from lightrft.strategy import get_strategy
from lightrft.strategy.backend_strategy import Step

transformers = pytest.importorskip("transformers")
pytest.importorskip("deepspeed")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries below

BACKENDS = {
    "fake": {"strategy": "fake", "fsdp": True},
    "FSDP": {"fsdp": True},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
}
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "logprobs": 0}
SIZE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model"))
    tiny_text_model(path)
    return path


def with_engine(program, folder, size=SIZE, backend="fake", engines="model", tp_size=2, **settings):
    """What ``program(strategy)`` returns on each rank; the strategy has an engine, which ends afterwards."""

    def on_rank():
        sizes = {"train_batch_size": size, "engine_tp_size": tp_size, "prompt_max_len": 16, "generate_max_len": 16}
        strategy = get_strategy({"pretrain": folder, **sizes, **settings, **BACKENDS[backend]})
        strategy.setup_inference_engine()
        found = program(strategy)
        strategy.inference_engine.shutdown()
        dist.destroy_process_group()
        return found

    return SimWorld(size, engines=engines).run(on_rank)


def prepared(strategy, folder):
    with strategy.init_model_context():
        actor = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = strategy.create_optimizer(actor, lr=1e-2)
    return strategy.prepare((actor, optimizer, None))[:2]


def trained(strategy, actor, optimizer):
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    strategy.backward(actor(input_ids=ids, labels=ids).loss, actor, optimizer)
    strategy.optimizer_step(optimizer, actor, None)


def gap(actor, one, temperature=1.0):
    """Between the engine's log-probs of a completion and the trainer's."""
    ids = torch.tensor([[*one.prompt_token_ids, *one.output_token_ids]])
    logits = actor(input_ids=ids).logits.detach()[0, len(one.prompt_token_ids) - 1 : -1].float() / temperature
    found = logits.log_softmax(-1).gather(1, torch.tensor(one.output_token_ids).unsqueeze(1)).squeeze(1)
    return (found - torch.tensor(one.log_probs)).abs().max().item()


def iterations(folder, **settings):
    """Two iterations: for each rank the completions before and after a step, and how far log-probs are apart."""

    def program(strategy):
        actor, optimizer = prepared(strategy, folder)
        found = []
        for _ in range(2):
            prompts = [[3, 4 + strategy.get_rank()], [5]][: 1 + strategy.get_rank() % 2]
            several = strategy.gather_and_generate(GREEDY, all_prompt_token_ids=prompts)
            found.append(([one.output_token_ids for one in several], [one.weight_version for one in several]))
            # Every rank goes through the model as often as the others do.
            assert max(gap(actor, one) for one in [*several, several[0]][:2]) < 1e-4
            assert str(strategy.inference_engine_status) == "asleep"
            trained(strategy, actor, optimizer)
            strategy.update_engine_weights(actor)
        return found

    return with_engine(program, folder, **settings)


@pytest.fixture(scope="module")
def expected(folder):
    return iterations(folder, tp_size=1, engine_type="vllm")


def kinds():
    """Backends, engines and tensor-parallel sizes; those that say the least more take their time apart."""
    for backend in BACKENDS:
        for engine in ("vllm", "sglang"):
            for tp in (1, 2, 4):
                usual = tp == 2 and backend != "ZeRO-2"
                yield pytest.param(backend, engine, tp, marks=() if usual else pytest.mark.slow)


@pytest.mark.parametrize(("backend", "engine", "tp"), list(kinds()))
def test_f16_every_backend_and_engine_generates_the_same(folder, expected, backend, engine, tp):
    found = iterations(folder, backend=backend, engine_type=engine, tp_size=tp)
    assert found == expected
    for before, after in found:
        assert before[0] != after[0]
        assert {*before[1]} == {0}
        assert {*after[1]} == {1}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_f16_log_probs_at_another_temperature_are_the_trainers(folder, engine):
    def program(strategy):
        actor, _ = prepared(strategy, folder)
        params = {"temperature": 0.7, "max_tokens": 8, "logprobs": 0, "n": 2, "ignore_eos": True}
        several = strategy.gather_and_generate(params, all_prompt_token_ids=[[3, 4 + strategy.get_rank()]])
        assert {one.log_probs_mode for one in several} == {"processed"}
        worst = max(gap(actor, one, 0.7) for one in several)
        return worst, [one.output_token_ids for one in several]

    found = with_engine(program, folder, backend="FSDP", engine_type=engine)
    assert max(worst for worst, _ in found) < 1e-4
    assert len({tokens for _, both in found for tokens in both}) == 2 * SIZE


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(("ours", "theirs"), [(1, 2), (2, 1)])
def test_an_engine_of_another_size_than_the_groups_of_the_strategy_is_refused(folder, engine, ours, theirs):
    def program(strategy):
        strategy.inference_engine.shutdown()
        other = {"pretrain": folder, "train_batch_size": 2, "engine_tp_size": theirs, "engine_type": engine}
        with pytest.raises(ConfigError, match=f"engine_tp_size={theirs}, but {ours} ranks share the engine"):
            strategy.setup_inference_engine(other)

    with_engine(program, folder, size=2, tp_size=ours, engine_type=engine)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_f01_f05_a_deep_sleep_asks_for_new_weights_and_no_cache_outlives_them(folder, engine):
    def program(strategy):
        actor, optimizer = prepared(strategy, folder)
        made = strategy.inference_engine
        prompts = [[3, 4, 5, 6 + strategy.get_rank()]]

        def tokens():
            return strategy.gather_and_generate(GREEDY, all_prompt_token_ids=prompts)[0].output_token_ids

        tokens()
        strategy.wakeup_inference_engine()
        made.sleep(level=2)
        with pytest.raises(StaleWeightsError, match="has dropped its weights, by a sleep at level 2 at"):
            tokens()
        trained(strategy, actor, optimizer)
        strategy.update_engine_weights(actor)
        after = tokens()
        strategy.inference_engine.shutdown()
        strategy.setup_inference_engine(actor=actor)
        assert tokens() == after

    with_engine(program, folder, engine_type=engine)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    "backend", ["fake", *(pytest.param(one, marks=pytest.mark.slow) for one in ("FSDP", "ZeRO-3"))]
)
def test_f01_weights_that_every_sleep_drops_are_sent_again(folder, engine, backend):
    def program(strategy):
        actor, optimizer = prepared(strategy, folder)
        strategy.update_engine_weights(actor)
        made = strategy.inference_engine
        found = []
        for turn in range(3):
            (one,) = strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3, 4 + strategy.get_rank()]])
            assert gap(actor, one) < 1e-4
            assert (str(strategy.inference_engine_status), made.is_stale) == ("asleep", True)
            found.append((one.output_token_ids, one.weight_version, strategy.engine_updates))
            if turn == 1:
                trained(strategy, actor, optimizer)
        return found

    ranks = with_engine(program, folder, size=2, backend=backend, engine_type=engine, engine_sleep_level=2)
    for first, second, third in ranks:
        assert [versions for _, *versions in (first, second, third)] == [[1, 1], [2, 1], [3, 1]]
        assert first[0] == second[0] != third[0]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_f01_weights_that_were_dropped_and_that_nobody_can_send_again_are_told(folder, engine):
    def program(strategy):
        asking = lambda: strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3]])  # noqa: E731 - called thrice
        asking()
        with pytest.raises(StaleWeightsError, match="has dropped its weights"):  # those of the folder
            asking()
        actor, _ = prepared(strategy, folder)
        strategy.update_engine_weights(actor)
        if strategy.get_rank() == 0:
            del actor
            gc.collect()
        asking()
        with pytest.raises(StaleWeightsError, match="has dropped its weights"):
            asking()

    with_engine(program, folder, size=2, engines="hash", engine_type=engine, engine_sleep_level=2)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_f06_f20_an_update_that_fails_is_an_error_on_all_ranks_and_the_next_one_is_whole(folder, engine):
    def program(strategy):
        actor, optimizer = prepared(strategy, folder)
        smaller = strategy.prepare_model(torch.nn.Linear(2, 2), is_training=True)
        with pytest.raises(WeightSyncError, match="unexpected: weight"):
            strategy.update_engine_weights(smaller)
        with pytest.raises(EngineStateError, match="holds a part of new weights|not all were sent again"):
            strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3, 4]])
        trained(strategy, actor, optimizer)
        strategy.update_engine_weights(actor)
        (one,) = strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3, 4]])
        assert gap(actor, one) < 1e-4

    with_engine(program, folder, engine_type=engine)


@pytest.mark.parametrize("backend", ["fake", "FSDP"])
def test_f17_an_actor_that_one_rank_has_not_prepared_is_an_error_on_all(folder, backend):
    def program(strategy):
        actor, _ = prepared(strategy, folder)
        given = torch.nn.Linear(2, 2) if strategy.get_rank() == 1 else actor
        with pytest.raises(ConfigError, match="rank 1: Linear was not prepared by this strategy"):
            strategy.update_engine_weights(given)
        strategy.update_engine_weights(actor)

    with_engine(program, folder, size=2, backend=backend, engines="hash", engine_type="vllm")


def test_f17_an_update_while_the_engine_of_one_group_is_dead_is_an_error_on_all(folder):
    def program(strategy):
        actor, _ = prepared(strategy, folder)
        if strategy.get_rank() < 2:
            strategy.inference_engine.shutdown()
        with pytest.raises(EngineStateError, match=r"rank 0: .* which is dead"):
            strategy.update_engine_weights(actor)

    with_engine(program, folder, engines="hash", engine_type="vllm")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_f01_after_an_update_that_failed_the_weights_of_the_one_before_are_not_sent_again(folder, engine):
    def program(strategy):
        actor, _ = prepared(strategy, folder)
        smaller = strategy.prepare_model(torch.nn.Linear(2, 2), is_training=True)
        strategy.update_engine_weights(actor)
        with pytest.raises(WeightSyncError, match="unexpected: weight"):
            strategy.update_engine_weights(smaller)
        with pytest.raises(StaleWeightsError):
            strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3, 4]])
        strategy.update_engine_weights(actor)
        assert strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3, 4]])

    with_engine(program, folder, size=2, engines="hash", engine_type=engine, engine_sleep_level=2)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_k10_f17_a_prompt_that_an_engine_refuses_is_an_error_on_its_group_and_no_other(folder, engine):
    def program(strategy):
        bad = strategy.get_rank() == 1
        try:
            found = len(strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[999 if bad else 3]]))
        except EngineStateError as error:
            found = str(error)
        except ValueError as error:
            found = str(error)
        again = len(strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3]]))
        return found, again

    found = with_engine(program, folder, engine_type=engine)
    assert [one for one, _ in found[2:]] == [1, 1]
    assert "999" in found[0][0]
    assert "999" in found[1][0]
    assert [again for _, again in found] == [1] * SIZE


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_k10_f12_what_is_wrong_on_one_rank_alone_is_told_to_both_which_stay_in_step(folder, engine):
    def program(strategy):
        odd = strategy.get_rank() == 1

        def generate(**more):
            return strategy.gather_and_generate({**GREEDY, **more}, all_prompt_token_ids=[[3]])

        told = []
        for call in (
            lambda: generate(temperature=-1 if odd else 0),
            lambda: generate(max_tokens=4 + odd),
            lambda: strategy.engine_generate_local(
                GREEDY, multi_modal_inputs=[{"tokens" if odd else "prompt_token_ids": [3]}]
            ),
        ):
            with pytest.raises(ConfigError) as caught:
                call()
            told.append(str(caught.value))
        return told, len(generate())

    first, second = with_engine(program, folder, size=2, engines="hash", engine_type=engine)
    assert first == second
    (temperature, length, prompt), completions = first
    assert "rank 1: sampling parameters: temperature=-1: expected 0 or more" in temperature
    assert "max_tokens=4" in length
    assert "on rank 1; expected the same on all ranks" in length
    assert "rank 1: expected a mapping with some of" in prompt
    assert completions == 1


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_f03_an_update_wakes_the_weights_alone_and_all_of_it_sleeps_again(folder, engine):
    def program(strategy):
        actor, optimizer = prepared(strategy, folder)
        made = strategy.inference_engine
        strategy.maybe_sleep_inference_engine()
        found = []
        for turn in range(3):
            trained(strategy, actor, optimizer)
            strategy.update_engine_weights(actor, verify=True)
            found.append((str(strategy.inference_engine_status), sorted(made.asleep)))
            if turn == 1:  # before anything is generated
                strategy.maybe_sleep_inference_engine()
                found.append((str(strategy.inference_engine_status), sorted(made.asleep)))
        (one,) = strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3, 4]], sleep_engine=False)
        found.append((str(strategy.inference_engine_status), sorted(made.asleep)))
        assert gap(actor, one) < 1e-4
        return found

    half, wholly = ("asleep", ["kv_cache"]), ("asleep", ["kv_cache", "weights"])
    assert with_engine(program, folder, engine_type=engine) == [[half, half, wholly, half, ("awake", [])]] * SIZE


CALLS = {
    "vllm": {
        "generate": ["generate"],
        "sleep": ["sleep"],
        "wake_up": ["wake_up"],
        "update": ["collective_rpc"],
        "reset_caches": ["reset_prefix_cache"],
    },
    "sglang": {
        "generate": ["generate"],
        "sleep": ["release_memory_occupation"],
        "wake_up": ["resume_memory_occupation"],
        "update": ["begin_weight_update", "update_weights_from_tensor", "end_weight_update"],
        "reset_caches": ["flush_cache"],
    },
}
USUAL = ("sleep", "end_weight_update")
FAILING = [
    pytest.param(kind, move, call, marks=() if call in USUAL else pytest.mark.slow)
    for kind, moves in CALLS.items()
    for move, calls in moves.items()
    for call in calls
]


@pytest.mark.parametrize(("engine", "move", "call"), FAILING)
def test_f17_a_call_of_the_library_that_fails_is_told_to_all_ranks_and_the_engine_goes_on(folder, engine, move, call):
    def program(strategy):
        actor, _ = prepared(strategy, folder)
        made = strategy.inference_engine
        prompts = [[3, 4 + strategy.get_rank()]]
        moves = {
            "generate": lambda: strategy.gather_and_generate(GREEDY, all_prompt_token_ids=prompts, sleep_engine=False),
            "sleep": made.sleep,
            "wake_up": made.wake_up,
            "update": lambda: strategy.update_engine_weights(actor),
            "reset_caches": made.reset_caches,
        }
        before = [one.output_token_ids for one in moves["generate"]()]
        if move == "wake_up":
            made.sleep()
        library = made._llm if engine == "vllm" else made._launched and made._launched.engine
        # Ranks of vLLM compute together: one that fails alone is the end of all of them, see below.
        fails = strategy.get_rank() == (1 if engine == "vllm" else 0) or (engine, call) == ("vllm", "generate")
        original = getattr(library, call, None)

        def broken(*args, **kwargs):
            setattr(library, call, original)
            raise RuntimeError("the device is lost")

        if fails:
            setattr(library, call, broken)
        with pytest.raises((EngineStateError, WeightSyncError), match="the device is lost") as caught:
            moves[move]()
        told = str(caught.value)
        strategy.update_engine_weights(actor)
        after = [one.output_token_ids for one in moves["generate"]()]
        return told, before == after

    first, second = with_engine(program, folder, size=2, engines="hash", engine_type=engine)
    assert first == second
    assert first[1]


def test_f17_a_rank_that_fails_alone_does_not_wait_for_those_that_wait_for_it(folder):
    told = []

    def program(strategy):
        made = strategy.inference_engine

        def broken(*args, **kwargs):
            raise RuntimeError("the device is lost")

        if strategy.get_rank():
            made._llm.generate = broken
        begin = time.monotonic()
        with pytest.raises(LostRanksError) as caught:
            strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3]])
        told.append((str(caught.value), str(made.status), time.monotonic() - begin))
        raise caught.value

    with pytest.raises(RankFailedError, match="rank 0  waits in all_gather"):
        with_engine(program, folder, size=2, engines="hash", engine_type="vllm")
    ((message, status, seconds),) = told
    assert "failed on rank 1 of its group (RuntimeError: the device is lost), and rank 0 waits for it" in message
    assert status == "dead"
    assert 60 < seconds < 61


def test_f17_an_engine_that_one_rank_cannot_mend_is_dead_on_all_and_replaced(folder):
    def program(strategy):
        actor, _ = prepared(strategy, folder)
        made = strategy.inference_engine

        def broken(*args, **kwargs):
            raise RuntimeError("the device is lost")

        if strategy.get_rank():
            made._llm.collective_rpc = broken
        with pytest.raises(WeightSyncError, match="vLLM is dead: a failed update could not be ended"):
            strategy.update_engine_weights(actor)
        status = str(strategy.inference_engine_status)
        strategy.setup_inference_engine(actor=actor)
        found = len(strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3]]))
        return status, found

    assert with_engine(program, folder, size=2, engines="hash", engine_type="vllm") == [("dead", 1)] * 2


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_f06_verify_knows_every_name_of_the_dtype_of_an_engine(folder, engine):
    def program(strategy):
        actor, _ = prepared(strategy, folder)
        strategy.update_engine_weights(actor, verify=True)
        return strategy.inference_engine.weights_dtype

    settings = {"engine_type": engine, "engine_options": {"dtype": "half"}}
    assert with_engine(program, folder, size=1, tp_size=1, engines="hash", **settings) == [torch.float16]


@pytest.fixture(scope="module")
def saved_by_torch(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved by torch")
    shutil.copytree(folder, path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    return str(path)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_f06_weights_that_are_missing_are_named_where_the_model_was_saved_by_torch(saved_by_torch, engine):
    def program(strategy):
        actor, _ = prepared(strategy, saved_by_torch)
        whole = strategy.full_parameters
        strategy.full_parameters = lambda model: ((n, one) for n, one in whole(model) if "q_proj" not in n)
        with pytest.raises(WeightSyncError, match="missing: model.layers.0.self_attn.q_proj"):
            strategy.update_engine_weights(actor)
        strategy.full_parameters = whole
        strategy.update_engine_weights(actor, verify=True)

    with_engine(program, saved_by_torch, size=1, tp_size=1, engines="hash", engine_type=engine)


def test_f06_weights_that_nothing_can_be_compared_with_are_told_at_the_start():
    with pytest.warns(UserWarning, match="any/name: no weights lie on this machine.*are not checked"):
        with_engine(lambda strategy: None, "any/name", size=1, tp_size=1, engines="hash", engine_type="vllm")


@pytest.fixture(scope="module")
def with_buffers(tmp_path_factory):
    """A mixture of experts, whose checkpoint has the biases of its router, which are no parameters."""
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_group=2, topk_group=1,
        num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp("with buffers"))
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_f06_buffers_that_the_checkpoint_has_are_sent(with_buffers, engine, backend):
    def program(strategy):
        actor, _ = prepared(strategy, with_buffers)
        names, made = [], strategy.inference_engine
        original = made.update_weights

        def watched(buckets, version):
            original(([names.append(name) or (name, one) for name, one in each] for each in buckets), version)

        made.update_weights = watched
        strategy.update_engine_weights(actor)
        return [name for name in names if "bias" in name]

    found = with_engine(
        program, with_buffers, size=2, backend=backend, engines="hash", engine_type=engine, prompt_max_len=8
    )
    assert found == [["model.layers.1.mlp.gate.e_score_correction_bias"]] * 2


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(("dtype", "matrices"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_weights_travel_in_the_dtype_of_an_engine_that_has_a_narrower_one(folder, engine, dtype, matrices):
    def program(strategy):
        actor, _ = prepared(strategy, folder)
        seen, made = set(), strategy.inference_engine
        original = made.update_weights

        def watched(buckets, version):
            original(
                ([seen.add((one.dim() > 1, one.dtype)) or (name, one) for name, one in each] for each in buckets),
                version,
            )

        made.update_weights = watched
        strategy.update_engine_weights(actor, verify=True)
        return seen

    found = with_engine(
        program, folder, size=1, tp_size=1, engines="hash", engine_type=engine, engine_options={"dtype": dtype}
    )
    assert found == [{(True, matrices), (False, torch.float32)}]


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_f06_weights_that_no_step_has_changed_are_named(folder, backend):
    def program(strategy):
        actor, optimizer = prepared(strategy, folder)
        trained(strategy, actor, optimizer)
        strategy.update_engine_weights(actor, verify=True)  # nothing to compare with
        trained(strategy, actor, optimizer)
        strategy.update_engine_weights(actor, verify=True)
        strategy._step = lambda one: Step(norm=1.0, applied=True)  # of an optimizer that has other parameters
        trained(strategy, actor, optimizer)
        strategy.update_engine_weights(actor)
        message = r"no weight has changed by the optimizer steps .*: model\.embed_tokens\.weight, .* and \d+ more\. The"
        for _ in range(2):
            with pytest.raises(WeightSyncError, match=message):
                strategy.update_engine_weights(actor, verify=True)
        del strategy._step
        trained(strategy, actor, optimizer)
        strategy.update_engine_weights(actor, verify=True)

    with_engine(program, folder, size=2, backend=backend, engines="hash", engine_type="vllm")


def test_f06_weights_that_need_not_have_changed_are_no_error(folder, tmp_path):
    def program(strategy):
        actor, optimizer = prepared(strategy, folder)
        rates = [group["lr"] for group in optimizer.param_groups]
        strategy.update_engine_weights(actor, verify=True)
        strategy.update_engine_weights(actor, verify=True)  # without a step
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        trained(strategy, actor, optimizer)
        strategy.update_engine_weights(actor, verify=True)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        strategy.save_ckpt(actor, str(tmp_path))
        trained(strategy, actor, optimizer)
        strategy.load_ckpt(actor, str(tmp_path))
        strategy.update_engine_weights(actor, verify=True)  # back where it was
        whole = strategy.unwrap_model(actor)
        for name, parameter in whole.named_parameters():
            parameter.requires_grad_("norm.weight" in name)
        trained(strategy, actor, optimizer)
        strategy.update_engine_weights(actor, verify=True)  # most have not changed
        strategy._step = lambda one: Step(norm=1e-9, applied=True)  # as if nothing were left of the gradient
        trained(strategy, actor, optimizer)
        strategy.update_engine_weights(actor, verify=True)
        strategy._step = lambda one: Step(norm=math.inf, applied=False)
        trained(strategy, actor, optimizer)
        strategy.update_engine_weights(actor, verify=True)
        strategy._step = lambda one: Step(norm=1.0, applied=True)
        trained(strategy, actor, optimizer)
        whole.requires_grad_(False)  # as adapters that are switched off
        strategy.update_engine_weights(actor, verify=True)

    with_engine(program, folder, size=1, tp_size=1, engines="hash", engine_type="vllm")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_k07_each_update_is_of_the_actor_that_it_is_given(folder, engine):
    def program(strategy):
        first, second = prepared(strategy, folder), prepared(strategy, folder)
        trained(strategy, *second)
        found = []
        for actor in (second[0], first[0], second[0], first[0]):
            strategy.update_engine_weights(actor, verify=True)
            (one,) = strategy.gather_and_generate(GREEDY, all_prompt_token_ids=[[3, 4]])
            assert gap(actor, one) < 1e-4
            found.append(one.output_token_ids)
        return found

    for found in with_engine(program, folder, size=2, engine_type=engine):
        assert found[:2] == found[2:]
        assert found[0] != found[1]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_k05_all_ranks_know_whether_their_engine_takes_seeds(folder, engine):
    found = with_engine(
        lambda strategy: strategy.inference_engine.takes_seeds, folder, engines="hash", engine_type=engine
    )
    assert found == [engine == "vllm"] * SIZE


@pytest.mark.parametrize(
    ("engine_type", "options"),
    [("vllm", {}), ("sglang", {}), ("sglang", {"enable_deterministic_inference": True})],
    ids=["vllm", "sglang", "sglang by seeds"],
)
def test_each_engine_draws_samples_of_its_own(folder, engine_type, options):
    """Else the samples of a prompt are fewer than they seem, wherever its copies are on several engines."""

    def program(strategy):
        drawn = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True, "n": 3}
        calls = [strategy.gather_and_generate(drawn, all_prompt_token_ids=[[3, 4]]) for _ in range(2)]
        return [one.output_token_ids for call in calls for one in call]

    found = with_engine(program, folder, engine_type=engine_type, engines="hash", engine_options=options)
    completions = [one for each in found for one in each]
    assert len(completions) == SIZE * 2 * 3
    assert len(set(completions)) == len(completions)


@pytest.mark.parametrize("engine_type", ["vllm", "sglang"])
def test_samples_do_not_depend_on_the_order_of_prompts(folder, engine_type):
    def completions(prompts):
        def program(strategy):
            drawn = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True, "n": 2}
            found = strategy.gather_and_generate(drawn, all_prompt_token_ids=prompts)
            return sorted((one.prompt_token_ids, one.output_token_ids) for one in found)

        (found,) = with_engine(program, folder, tp_size=1, size=1, engines="hash", engine_type=engine_type)
        return found

    prompts = [[3, 4], [5], [6, 7, 8], [5]]
    forwards = completions(prompts)
    assert forwards == completions(prompts[::-1])
    assert len(set(forwards)) == 8


@pytest.mark.parametrize("engines", ["hash", "model"])
def test_completions_are_handed_to_the_ranks_of_an_engine_and_not_kept(folder, engines):
    def program(strategy):
        return strategy.engine_generate_local(GREEDY, prompt_token_ids=[[3, 4], [5]])

    found = with_engine(program, folder, tp_size=4, engines=engines, engine_type="vllm")
    assert [one.output_token_ids for one in found[0]] == [one.output_token_ids for one in found[3]]
    assert not core._unread
