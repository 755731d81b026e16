"""K24: each setting of training changes what it says, on every strategy that it speaks of."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from model_batches import Shapes, batch

from lightrft.errors import ConfigError, RankFailedError
from lightrft.models import Actor, Critic, tiny
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import SETTINGS, Subject, sequences, workload
from lightrft.sim.contracts.strategy.training import accumulating
from lightrft.sim.contracts.strategy.workload import Recipe
from lightrft.strategy import StrategyConfig, get_strategy
from lightrft.strategy.utils import schedulers

pytestmark = pytest.mark.filterwarnings("ignore")  # of deepspeed, and of torch about what it calls
ZERO = [name for name in SETTINGS if name.startswith("ZeRO")]


def run(name, program, *args, size=2):
    """What ``program`` returns on each rank."""
    world = lambda ranks: SimWorld(ranks, stall_limit=15)  # noqa: E731 - the subject takes a function
    return Subject(world=world, settings=SETTINGS[name], name=name, size=size).run(program, *args)


def train(strategy, model, optimizer, steps):
    norms = []
    for step in range(steps):
        for ids in workload.micro_batches(strategy, step):
            strategy.backward(workload.loss_of(model(ids), ids), model, optimizer)
            norms.append(strategy.optimizer_step(optimizer, model))
    return norms


# -- Adam -------------------------------------------------------------------------------------------------------------


def _with_betas(make):
    strategy = make(max_norm=0.0, adam_betas=(0.5, 0.6), actor_learning_rate=0.01, **accumulating(2, 1))
    model = strategy.prepare(workload.transformer())
    train(strategy, model, strategy.create_optimizer(model), 3)
    return workload.weights(strategy, model)


def _plainly_with_betas(betas):
    model = workload.transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=betas, weight_decay=0.0)
    for step in range(3):
        ids = workload.batch(step)
        workload.loss_of(model(ids), ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", SETTINGS)
def test_adam_betas(name):
    for found in run(name, _with_betas):
        workload.same(found, _plainly_with_betas((0.5, 0.6)), what="betas of 0.5 and 0.6")
        with pytest.raises(AssertionError, match="differs"):
            workload.same(found, _plainly_with_betas((0.9, 0.95)), what="the default betas")


# -- Learning rates ---------------------------------------------------------------------------------------------------


def rates(schedule, warm_up, steps):
    """The rate of each step, and of one after the end, for a peak of 1."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = StrategyConfig(lr_scheduler=schedule, lr_warmup_ratio=warm_up)
    scheduler = schedulers.make(optimizer, config, steps)
    found = []
    for _ in range(steps + 2):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "warm_up", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1, 1]),
        ("constant", 0.5, [1 / 2, 1, 1, 1, 1, 1]),
        ("linear", 0.0, [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        ("linear", 0.25, [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        ("linear", 0.5, [1 / 2, 1, 2 / 3, 1 / 3, 0, 0]),
        ("linear", 1.0, [1 / 4, 2 / 4, 3 / 4, 1, 0, 0]),
        ("cosine_with_min_lr", 0.0, [1, 0.1 + 0.45 * (1 + 0.5**0.5), 0.55, 0.1 + 0.45 * (1 - 0.5**0.5), 0.1, 0.1]),
        ("cosine_with_min_lr", 0.6, [1 / 3, 2 / 3, 1, 0.55, 0.1, 0.1]),
    ],
)
def test_lr_scheduler_and_lr_warmup_ratio(schedule, warm_up, expected):
    assert rates(schedule, warm_up, 4) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("schedule", schedulers.SCHEDULES)
def test_a_run_of_one_step_trains_at_the_peak(schedule):
    assert rates(schedule, 0.03, 1)[0] == 1


def test_a_run_has_steps():
    with pytest.raises(ConfigError, match="max_steps is 0: expected"):
        rates("linear", 0.0, 0)


def _whole_run(make, given):
    strategy = make(actor_learning_rate=1.0, lr_scheduler="linear", lr_warmup_ratio=0.5)
    (_, optimizer, scheduler), *_ = strategy.prepare_models_and_optimizers(
        workload.transformer(), None, None, None, given, 4
    )
    before = optimizer.param_groups[0]["lr"]
    scheduler.step()
    return before, optimizer.param_groups[0]["lr"]


def test_a_strategy_takes_its_own_schedule_or_that_of_the_call():
    given = {"actor_learning_rate": 2.0, "lr_scheduler": "linear", "lr_warmup_ratio": 0.0}
    assert run("fake, as FSDP", _whole_run, None) == [(1 / 2, 1)] * 2
    assert run("fake, as FSDP", _whole_run, given) == [(2, 3 / 2)] * 2


# -- What DeepSpeed does ----------------------------------------------------------------------------------------------


def _of_deepspeed(make, settings):
    strategy = make(max_norm=0.0, **accumulating(2, 4), **settings)
    model = workload.transformer()
    model, optimizer, _ = strategy.prepare((model, Recipe().make(model.parameters()), None))
    norms = train(strategy, model, optimizer, 1)
    dtype = str(model.optimizer.gradient_accumulation_dtype).removeprefix("torch.")
    return norms[-1], workload.weights(strategy, model), model.zero_overlap_comm(), dtype


@pytest.mark.parametrize("name", ZERO)
def test_overlap_comm(name):
    _, without, off, _ = run(name, _of_deepspeed, {})[0]
    _, with_it, on, _ = run(name, _of_deepspeed, {"overlap_comm": True})[0]
    assert (off, on) == (False, True)
    workload.same(with_it, without, what="overlapped", within=1e-6)


@pytest.mark.parametrize("name", ZERO)
def test_grad_accum_dtype(name):
    found = {
        dtype: run(name, _of_deepspeed, {"bf16": True, "grad_accum_dtype": dtype})[0] for dtype in ("bf16", "fp32")
    }
    assert [dtype for *_, dtype in found.values()] == ["bfloat16", "float32"]
    assert found["bf16"][0] != found["fp32"][0]  # what is added up in bfloat16 is rounded
    assert found["bf16"][0] == pytest.approx(found["fp32"][0], rel=0.01)


# -- Activations ------------------------------------------------------------------------------------------------------


def _recomputes(make, on):
    strategy = make(max_norm=0.0, gradient_checkpointing=on)
    model, seen = sequences.llama(), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(1))
    model = strategy.prepare_model(model, is_training=True)
    model.train()
    ids = next(workload.micro_batches(strategy, 0, strategy.world_size))
    strategy.backward(workload.loss_of(model(input_ids=ids).logits, ids), model, None)
    norm = strategy.optimizer_step(strategy.create_optimizer(model), model)
    return len(seen), norm


@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_checkpointing_computes_twice_and_changes_nothing(name):
    (once, without), _ = run(name, _recomputes, False)
    (twice, with_it), _ = run(name, _recomputes, True)
    assert (once, twice) == (1, 2)
    assert with_it == pytest.approx(without, rel=1e-5)


def _cannot(make):
    make(gradient_checkpointing=True).prepare_model(workload.transformer(), is_training=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_gradient_checkpointing_of_a_model_without_it_is_refused(name):
    with pytest.raises(RankFailedError, match="Transformer has no gradient_checkpointing_enable"):
        run(name, _cannot)


# -- Log-probs and values ---------------------------------------------------------------------------------------------


def _computes(make, folder, kind, settings):
    """The shape of the rows that the model computes, the shapes of all tensors of a pass, and what it says."""
    strategy = make(**settings)
    model = strategy.prepare(kind.from_pretrained(folder, settings=strategy.config))
    rows = []
    embeddings = strategy.unwrap_model(model).model.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, given: rows.append(tuple(given[0].shape)))
    with torch.no_grad(), Shapes() as shapes:
        found = model(*batch((9, 1, 3, 12, 2), 12))
    return rows, shapes.seen, found[0] if kind is Actor else found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers")
    path = str(tmp_path_factory.mktemp("model"))
    tiny.tiny_text_model(path)
    return path


@pytest.mark.parametrize("name", ["fake, as FSDP", "FSDP", "ZeRO-3"])
@pytest.mark.parametrize("kind", [Actor, Critic])
def test_packing_samples(name, kind, folder):
    padded, _, expected = run(name, _computes, folder, kind, {})[0]
    packed, _, found = run(name, _computes, folder, kind, {"packing_samples": True})[0]
    assert (padded, packed) == ([(5, 12)], [(3, 12)])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["fake, as FSDP", "FSDP", "ZeRO-3"])
def test_fused_linear_logprob_and_chunk_size(name, folder):
    tokens = 8 + 2 + 11 + 1
    plain, few, many = (
        run(name, _computes, folder, Actor, settings)[0]
        for settings in ({"chunk_size": 50}, *({"fused_linear_logprob": True, "chunk_size": size} for size in (50, 60)))
    )
    widths = [{width for width in (50, 60, tiny.VOCABULARY) if (tokens, width) in one[1]} for one in (plain, few, many)]
    assert widths == [{tiny.VOCABULARY}, {50}, {60}]
    for _, _, log_probs in (few, many):
        torch.testing.assert_close(log_probs, plain[2], atol=2e-5, rtol=1e-5)


# -- Precision --------------------------------------------------------------------------------------------------------


def _warned(settings, name="use_mp_opt"):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        get_strategy({"strategy": "fake", "fsdp": True, **settings})
    return [str(warning.message) for warning in seen if name in str(warning.message)]


def test_use_mp_opt_in_float32_is_warned_of():
    (message,) = _warned({"use_mp_opt": True})
    assert "changes nothing in float32" in message
    assert _warned({"use_mp_opt": True, "bf16": True}) == _warned({"bf16": True}) == []


def test_engine_sleep_level_of_an_engine_that_never_sleeps_is_warned_of():
    deep, never = {"engine_sleep_level": 2}, {"enable_engine_sleep": False}
    (message,) = _warned({**deep, **never}, "engine_sleep_level")
    assert "changes nothing with enable_engine_sleep off" in message
    assert _warned(deep, "engine_sleep_level") == _warned(never, "engine_sleep_level") == []


# -- Places -----------------------------------------------------------------------------------------------------------


def _own_gpu(settings):
    os.environ.pop("LOCAL_RANK")
    strategy = get_strategy({"strategy": "fake", "train_batch_size": 4, **settings(int(os.environ["RANK"]))})
    dist.destroy_process_group()
    return strategy.device.index


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (lambda rank: {"num_gpu_per_node": 2}, [0, 1, 0, 1]),
        (lambda rank: {"local_rank": rank // 2}, [0, 0, 1, 1]),
        (lambda rank: {"local_rank": rank // 2, "num_gpu_per_node": 2}, [0, 0, 1, 1]),
    ],
    ids=["num_gpu_per_node", "local_rank", "both"],
)
def test_local_rank_and_num_gpu_per_node_choose_the_gpu_where_the_variables_do_not(settings, expected):
    assert SimWorld(4, gpus_per_node=4, cuda=True, stall_limit=15).run(_own_gpu, settings) == expected


def test_without_them_the_gpu_is_not_guessed():
    with pytest.raises(RankFailedError, match="LOCAL_RANK is missing in a world of 4"):
        SimWorld(4, gpus_per_node=4, cuda=True, stall_limit=15).run(_own_gpu, lambda rank: {})
