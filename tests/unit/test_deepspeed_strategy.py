"""DeepspeedStrategy on simulated ranks: what the contract of strategies does not say, because it is DeepSpeed's."""

import functools

import pytest
import torch
import torch.distributed as dist
from programs import tiny
from programs.zero_strategy import farthest, make, run, train, weights

from lightrft.errors import ConfigError, RankFailedError

pytestmark = pytest.mark.filterwarnings("ignore")  # of deepspeed, and of torch about what it calls
STAGES = pytest.mark.parametrize("stage", [1, 2, 3])
OFFLOADS = pytest.mark.parametrize("offload", [False, True])


# -- Accumulation: a loss that does not reach every parameter ---------------------------------------------------------


class Branching(torch.nn.Module):
    """Its middle layer takes part only if it is told so, as a vision tower does for samples with images."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.middle = torch.nn.Linear(8, 8)
        self.last = torch.nn.Linear(8, 1)

    def forward(self, x, through_middle):
        x = self.first(x)
        return self.last(self.middle(x) if through_middle else x).square().mean()


def branching():
    torch.manual_seed(0)
    return Branching()


def _input(number, rank):
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * number + rank))


def _branches(stage, accumulation, pattern, offload):
    strategy = make(stage, accumulation=accumulation, adam_offload=offload)
    model = branching()
    model, optimizer, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    for number, through_middle in enumerate(pattern):
        strategy.backward(model(_input(number, dist.get_rank()), through_middle), model, optimizer)
        strategy.optimizer_step(optimizer, model)
    return weights(strategy, model)


def _branches_plainly(accumulation, pattern, size):
    model = branching()
    optimizer = tiny.sgd(model.parameters())
    for number, through_middle in enumerate(pattern):
        for rank in range(size):
            (model(_input(number, rank), through_middle) / (accumulation * size)).backward()
        if (number + 1) % accumulation == 0:
            optimizer.step()
            optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@STAGES
@OFFLOADS
@pytest.mark.parametrize(
    ("accumulation", "pattern"),
    [(1, [True, False, False, True]), (2, [True, False, False, False, False, True, False, False])],
    ids=["each step", "two micro-batches a step"],
)
def test_a_parameter_that_a_loss_does_not_reach_is_not_moved_by_old_gradients_and_loses_none(  # K17
    stage, offload, accumulation, pattern
):
    found = run(2, _branches, stage, accumulation, pattern, offload)
    assert farthest(found, _branches_plainly(accumulation, pattern, 2)) < 1e-6


def _without_calling_the_engine(stage):
    strategy = make(stage, accumulation=2)
    model = tiny.transformer()
    model, optimizer, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    inside = strategy.unwrap_model(model)
    for number in range(4):
        ids = tiny.batch(number)
        strategy.backward(tiny.loss_of(inside(ids), ids), model, optimizer)
        strategy.optimizer_step(optimizer, model)
    return weights(strategy, model)


def _as_usual(stage):
    strategy = make(stage, accumulation=2)
    model = tiny.transformer()
    model, optimizer, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    train(strategy, model, optimizer)
    return weights(strategy, model)


@STAGES
def test_micro_batches_add_up_where_the_module_inside_is_called(stage):
    assert farthest(run(2, _without_calling_the_engine, stage), run(2, _as_usual, stage)) < 1e-6


def _drops(stage, offload, partial):
    strategy = make(stage, accumulation=3, adam_offload=offload)
    model = tiny.transformer()
    model, optimizer, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    train(strategy, model, optimizer, steps=1)
    for number in range(partial):
        ids = tiny.batch(50 + number)
        strategy.backward(tiny.loss_of(model(ids), ids), model, optimizer)
        strategy.optimizer_step(optimizer, model)
    dropped = strategy.drop_partial_accumulation(model)
    train(strategy, model, optimizer, first=1, steps=1)
    return dropped, weights(strategy, model)


@STAGES
@OFFLOADS
def test_k04_dropped_micro_batches_leave_nothing_behind(stage, offload):
    dropped, found = run(2, _drops, stage, offload, 2)
    assert dropped == 2
    none, expected = run(2, _drops, stage, offload, 0)
    assert none == 0
    assert farthest(found, expected) == 0


# -- Precision --------------------------------------------------------------------------------------------------------


def _overflows(stage, offload):
    strategy = make(stage, fp16=True, adam_offload=offload)
    model = tiny.transformer()
    optimizer = tiny.sgd(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, scheduler = strategy.prepare((model, optimizer, scheduler))
    rates, norms = [], []
    for step in range(3):
        ids = tiny.batch(step)
        loss = tiny.loss_of(model(ids), ids)
        loss = loss * 1e30 if step == 1 and dist.get_rank() == 1 else loss
        before = weights(strategy, model)
        strategy.backward(loss, model, optimizer)
        norms.append(strategy.optimizer_step(optimizer, model, scheduler))
        rates.append(optimizer.param_groups[0]["lr"])
        moved = farthest(weights(strategy, model), before) > 0
        assert moved is (step != 1)
    return rates, norms


@STAGES
@OFFLOADS
def test_k17_a_step_that_overflows_on_one_rank_moves_neither_weights_nor_scheduler(stage, offload):
    rates, norms = run(2, _overflows, stage, offload)
    assert rates == [0.05, 0.05, 0.025]
    assert norms[1] == float("inf")
    assert 0 < norms[0] < 10
    assert 0 < norms[2] < 10


def _mixed(stage, settings):
    strategy = make(stage, accumulation=2, **settings)
    model = tiny.transformer()
    model, optimizer, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    losses = train(strategy, model, optimizer, steps=3)
    return losses, {parameter.dtype for parameter in strategy.unwrap_model(model).parameters()}


@STAGES
@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True, "grad_accum_dtype": "fp32"},
        {"bf16": True, "adam_offload": True, "grad_accum_dtype": "fp32"},
        {"fp16": True, "adam_offload": True},
    ],
    ids=str,
)
def test_k17_precisions_and_offload_go_together(stage, settings):
    losses, dtypes = run(2, _mixed, stage, settings)
    expected = _exact()
    assert dtypes == {torch.bfloat16 if settings.get("bf16") else torch.float16}
    assert losses == pytest.approx(expected, abs=5e-3)


@functools.cache
def _exact():
    return run(2, _mixed, 2, {})[0]


def _finite(stage):
    """A loss that is not a number, in bfloat16, which DeepSpeed by itself steps with."""
    strategy = make(stage, bf16=True)
    model = tiny.transformer()
    model, optimizer, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    ids = tiny.batch(0)
    strategy.backward(tiny.loss_of(model(ids), ids) * float("nan"), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    return all(bool(value.isfinite().all()) for value in weights(strategy, model).values())


@STAGES
def test_a_nan_in_bfloat16_skips_the_step(stage):
    assert run(2, _finite, stage)


# -- Optimizers and schedulers ----------------------------------------------------------------------------------------


def _optimizers(stage):
    strategy = make(stage, actor_learning_rate=0.5, weight_decay=0.3)
    with strategy.init_model_context():
        early = tiny.transformer()
    optimizer = strategy.create_optimizer(early, lr=0.25, betas=(0.8, 0.9))
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    late = strategy.prepare(tiny.transformer())
    other = strategy.create_optimizer(late, lr=0.125)
    schedule = torch.optim.lr_scheduler.LambdaLR(other, lambda step: 0.1**step)
    before = weights(strategy, late)
    train(strategy, late, other, schedule, steps=1)
    name = "blocks.0.norm.weight"
    moved = farthest({name: weights(strategy, late)[name]}, {name: before[name]})
    return sizes, decays, [group["weight_decay"] for group in other.param_groups], moved, other.param_groups[0]["lr"]


@STAGES
def test_k30_matrices_decay_and_vectors_do_not_before_and_after_prepare(stage):
    sizes, decays, later, moved, rate = run(2, _optimizers, stage)
    matrices = sum(parameter.dim() > 1 for parameter in tiny.transformer().parameters())
    vectors = sum(parameter.dim() == 1 for parameter in tiny.transformer().parameters())
    assert sizes == [matrices, vectors]
    assert decays == later == [0.3, 0.0]
    assert moved == pytest.approx(0.125, rel=1e-3)  # what the first step of AdamW moves by without decay
    assert rate == pytest.approx(0.0125)


def _other_optimizer():
    strategy = make(2)
    model = tiny.transformer()
    model, _, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    with pytest.raises(ConfigError, match="SGD, which has no betas, eps"):
        strategy.create_optimizer(model)


def test_settings_of_adamw_are_refused_for_another_optimizer():
    run(1, _other_optimizer)


# -- Writing into weights ---------------------------------------------------------------------------------------------


def _averages(stage, prepared):
    strategy = make(stage)
    model, ema = tiny.transformer(seed=0), tiny.transformer(seed=1)
    ours = tiny.weights(model)
    expected = {name: 0.75 * value + 0.25 * ours[name] for name, value in tiny.weights(ema).items()}
    model, _, _ = strategy.prepare((model, tiny.sgd(model.parameters(), lr=0.0), None))
    if prepared == "frozen":
        ema = strategy.prepare(ema.requires_grad_(False))
    elif prepared == "trained":
        ema, stepping, _ = strategy.prepare((ema, tiny.sgd(ema.parameters(), lr=0.0), None))
    strategy.moving_average(model, ema, beta=0.75)
    if prepared == "trained":
        train(strategy, ema, stepping, steps=1)
    found = weights(strategy, ema) if prepared != "plain" else tiny.weights(ema)
    return farthest(found, expected)


@STAGES
@pytest.mark.parametrize("prepared", ["plain", "frozen", "trained"])
def test_an_average_stays_after_the_next_step(stage, prepared):
    assert run(2, _averages, stage, prepared) < 1e-6


def _averages_with_second_copies():
    strategy = make(3, zpg=2)
    model, ema = tiny.transformer(seed=0), tiny.transformer(seed=1)
    ours = tiny.weights(model)
    expected = {name: 0.75 * value + 0.25 * ours[name] for name, value in tiny.weights(ema).items()}
    model, _, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    ema = strategy.prepare(ema.requires_grad_(False))
    ids = tiny.batch(0, 0)
    with torch.no_grad():
        ema(ids)
        strategy.moving_average(model, ema, beta=0.75)
        found = ema(ids)
        plain = tiny.transformer()
        plain.load_state_dict(expected)
        return float((found - plain(ids)).abs().max())


def test_the_second_copies_of_zpg_follow_an_average():
    assert run(4, _averages_with_second_copies) < 1e-5


def _averages_beside_the_optimizer(stage):
    strategy = make(stage)
    model, ema = tiny.transformer(seed=0), tiny.transformer(seed=1)
    ours = tiny.weights(model)
    expected = {name: 0.75 * value + 0.25 * ours[name] for name, value in tiny.weights(ema).items()}
    model, _, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    ema.blocks[0].requires_grad_(False)
    ema, _, _ = strategy.prepare((ema, tiny.sgd(ema.blocks[1].parameters()), None))
    strategy.moving_average(model, ema, beta=0.75)
    return farthest(weights(strategy, ema), expected)


@STAGES
def test_parameters_that_the_optimizer_of_an_average_does_not_step_are_averaged_too(stage):
    assert run(2, _averages_beside_the_optimizer, stage) < 1e-6


# -- Models -----------------------------------------------------------------------------------------------------------


def _frozen(stage, settings):
    strategy = make(stage, **settings)
    model = strategy.prepare(tiny.transformer().requires_grad_(False))
    ids = tiny.batch(0, 0)
    with torch.no_grad():
        first = model(ids)
        strategy.offload_model(model)
        strategy.reload_model(model)
        again = model(ids)
        expected = tiny.transformer()(ids)
    spread = all(hasattr(parameter, "ds_id") for parameter in strategy.unwrap_model(model).parameters())
    return float((first.float() - expected).abs().max()), torch.equal(first, again), first.dtype, spread


@STAGES
@pytest.mark.parametrize(
    ("settings", "dtype", "within"),
    [({}, torch.float32, 1e-6), ({"bf16": True}, torch.bfloat16, 0.05), ({"fp16": True}, torch.float16, 0.005)],
    ids=["fp32", "bf16", "fp16"],
)
def test_frozen_models_evaluate_in_the_precision_of_the_run(stage, settings, dtype, within):
    error, same_again, found, spread = run(2, _frozen, stage, settings)
    assert error < within
    assert same_again
    assert found is dtype
    assert spread is (stage == 3)


def _partly_frozen(stage, moves):
    strategy = make(stage)
    model = tiny.transformer()
    model.embedding.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=0.01), None))
    for step in range(3):
        if moves:
            strategy.maybe_load_optimizer(optimizer)
        train(strategy, model, optimizer, first=step, steps=1)
        if moves:
            strategy.maybe_offload_optimizer(optimizer)
            strategy.offload_model(model)
            strategy.reload_model(model)
    return weights(strategy, model)


@STAGES
def test_moving_a_partly_frozen_model_with_its_optimizer_changes_nothing(stage):
    assert farthest(run(2, _partly_frozen, stage, True), run(2, _partly_frozen, stage, False)) == 0


def _shard_sizes(stage):
    strategy = make(stage)
    with pytest.raises(ConfigError, match="for a model that is trained: DeepSpeed spreads it over all ranks"):
        strategy.prepare_model(tiny.transformer(), is_training=True, shard_size=2)
    if stage != 3:
        return
    with strategy.init_model_context():
        model = tiny.transformer().requires_grad_(False)
    for size in (1, 2):
        with pytest.raises(ConfigError, match="spread over all ranks"):
            strategy.prepare_model(model, shard_size=size)


@STAGES
def test_k19_shard_sizes_that_deepspeed_cannot_do_are_refused(stage):
    run(4, _shard_sizes, stage)


def _spread_in_pairs():
    strategy = make(3)
    model = strategy.prepare_model(tiny.transformer().requires_grad_(False), shard_size=2)
    shares = [
        parameter.ds_tensor.numel() / parameter.ds_numel for parameter in strategy.unwrap_model(model).parameters()
    ]
    return farthest(weights(strategy, model), tiny.weights(tiny.transformer())), set(shares)


def test_a_frozen_model_is_spread_over_groups_at_stage_3():
    assert run(4, _spread_in_pairs) == (0, {0.5})


def _two_in_pairs():
    strategy = make(3)
    models = [strategy.prepare_model(tiny.transformer().requires_grad_(False), shard_size=2) for _ in range(2)]
    groups = {id(one.ds_process_group) for model in models for one in strategy.unwrap_model(model).parameters()}
    return len(groups)


def test_models_that_are_spread_alike_share_their_process_groups():
    assert run(4, _two_in_pairs) == 1


def _two_copies():
    strategy = make(3, zpg=2)
    model = tiny.transformer()
    model, optimizer, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    losses = train(strategy, model, optimizer, steps=3)
    return losses, model.zero_hpz_partition_size()


def _one_copy():
    strategy = make(3)
    model = tiny.transformer()
    model, optimizer, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    return train(strategy, model, optimizer, steps=3)


def test_zpg_keeps_a_second_copy_and_changes_no_loss():
    losses, size = run(4, _two_copies)
    assert size == 2
    assert losses == pytest.approx(run(4, _one_copy), abs=1e-6)


def _no_context(stage):
    strategy = make(stage)
    with strategy.init_model_context(meta_init=True):
        return any(hasattr(parameter, "ds_id") for parameter in tiny.transformer().parameters())


@STAGES
def test_models_are_built_spread_at_stage_3_only(stage):
    assert run(2, _no_context, stage) is (stage == 3)


# -- What DeepSpeed is told -------------------------------------------------------------------------------------------


def test_a_failing_rank_is_named_with_the_call_of_the_user():
    with pytest.raises(RankFailedError, match="was prepared for evaluation"):
        run(2, _trains_a_frozen_model)


def _trains_a_frozen_model():
    strategy = make(2)
    model = strategy.prepare(tiny.transformer().requires_grad_(False))
    strategy.backward(torch.zeros((), requires_grad=True), model, None)
