"""How FSDPV2Strategy shards and trains: units, precision, accumulation, loss scaling, which optimizer steps what."""

from __future__ import annotations

import warnings

import pytest
import torch
from programs import fsdp
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightrft.errors import ConfigError, OffloadStateError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import workload
from lightrft.sim.contracts.strategy.workload import same
from lightrft.strategy.fsdp.fsdp_utils import blocks_of


def on(ranks, program, *args, **world):
    return SimWorld(ranks, stall_limit=15, **world).run(fsdp.ending, program, *args)


# -- what is a unit ---------------------------------------------------------------------------------------------------


def test_the_blocks_of_a_transformers_model_are_those_that_it_declares():
    model = fsdp.qwen2()
    assert blocks_of(model) == list(model.model.layers)


def test_the_blocks_inside_a_module_around_a_transformers_model_are_found():
    actor = fsdp.Actor(fsdp.qwen2())
    assert blocks_of(actor) == list(actor.model.model.layers)


def test_the_blocks_of_another_model_are_the_classes_that_its_lists_repeat():
    model = workload.transformer()
    model.heads = nn.ModuleList([nn.Linear(2, 2)])
    assert blocks_of(model) == list(model.blocks)


def test_a_block_in_a_block_is_no_unit_of_its_own():
    inner = nn.ModuleList(nn.Sequential(nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])) for _ in range(2))
    assert blocks_of(nn.Sequential(inner)) == list(inner)


def test_what_shares_a_parameter_with_the_rest_is_no_unit():
    lists = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model = nn.Sequential(lists, nn.Linear(2, 2))
    model[1].weight = lists[0].weight
    assert blocks_of(model) == [lists[1]]


def _units():
    model = fsdp.strategy().prepare(fsdp.qwen2())
    units = [name for name, one in model.named_modules() if isinstance(one, FSDPModule)]
    return units, model.lm_head.weight is model.model.embed_tokens.weight


def test_k18_the_root_holds_what_is_tied_and_keeps_it_tied():
    assert on(2, _units) == [(["", "model.layers.0", "model.layers.1"], True)] * 2


def _placements(shard_size):
    ours = fsdp.strategy()
    model = ours.prepare_model(workload.transformer(), is_training=True, shard_size=shard_size)
    weight = model.head.weight
    assert isinstance(weight, DTensor)
    return weight.device_mesh.mesh.tolist(), tuple(weight.to_local().shape)


def test_consecutive_ranks_share_a_copy_of_the_weights():
    assert [mesh for mesh, _ in on(4, _placements, 2)] == [[[0, 1], [2, 3]]] * 4
    assert [shape for _, shape in on(4, _placements, 2)] == [(12, 16)] * 4
    assert on(4, _placements, -1) == [([0, 1, 2, 3], (6, 16))] * 4
    assert [shape for _, shape in on(2, _placements, 1)] == [(24, 16)] * 2


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "ranks", "accumulation"), [("plain", 1, 4), ("qwen2", 2, 2), ("actor", 2, 1), ("actor", 4, 1)]
)
def test_f13_losses_are_averaged_the_same_however_a_batch_is_split(kind, ranks, accumulation):
    expected = fsdp.plain(kind)
    for found in on(ranks, fsdp.trains, kind, accumulation, {}):
        torch.testing.assert_close(found["norms"], expected["norms"], rtol=1e-5, atol=0)
        same(found["weights"], expected["weights"], what=kind, within=2e-6)


@pytest.mark.parametrize("settings", [{"fsdp_cpu_offload": True}, {"use_mp_opt": True}])
def test_other_ways_to_keep_weights_train_the_same_in_fp32(settings):
    expected = fsdp.plain("plain")
    for found in on(2, fsdp.trains, "plain", 2, settings):
        same(found["weights"], expected["weights"], what=str(settings), within=2e-6)


def _gradient_exchanges(accumulation):
    world = SimWorld(2, stall_limit=15)
    world.run(fsdp.ending, fsdp.trains, "plain", accumulation, {}, 1)
    mine = [event.operation for event in world.trace if event.rank == 0]
    return sum("reduce_scatter" in operation for operation in mine), sum("all_reduce" in one for one in mine)


def test_gradients_are_exchanged_once_for_all_micro_batches_of_a_step():
    units = 3
    assert _gradient_exchanges(1) == (units, 1)  # and one collective for the norm
    assert _gradient_exchanges(2) == (units, 1)


def _clipped(max_norm):
    ours = fsdp.strategy(max_norm=max_norm)
    model = workload.transformer()
    groups = [{"params": [one]} for one in model.parameters()]
    model, optimizer = ours.prepare((model, torch.optim.SGD(groups, lr=1.0)))
    before = workload.weights(ours, model)
    _, norm = fsdp.step(ours, model, optimizer, 0)
    after = workload.weights(ours, model)
    moved = torch.stack([(after[name] - before[name]).norm() for name in before]).norm()
    return norm, float(moved)


def test_k03_clipping_is_by_one_norm_over_all_groups():
    for norm, moved in on(2, _clipped, 0.1):
        assert norm > 0.2
        assert moved == pytest.approx(0.1, rel=1e-3)
    for norm, moved in on(2, _clipped, 0.0):
        assert moved == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"bf16": True}])
def test_k04_a_dropped_accumulation_leaves_no_gradient(settings):
    assert on(2, _norms_of_first_step, settings, True) == on(2, _norms_of_first_step, settings, False)


def _norms_of_first_step(settings, dropping):
    ours = fsdp.strategy(2, **settings)
    model = workload.transformer()
    model, optimizer = ours.prepare((model, torch.optim.SGD(model.parameters(), lr=0.1)))
    if dropping:
        fsdp.step(ours, model, optimizer, 7)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert ours.drop_partial_accumulation(model) == 1
        assert "1 of 2 micro-batches" in str(caught[0].message)
    norms = []
    for ids in fsdp.ids_of(ours, 0).chunk(2):
        ours.backward(workload.loss_of(model(ids), ids), model, optimizer)
        norms.append(ours.optimizer_step(optimizer, model))
    return norms


def _steps_after_evaluating(evaluating):
    ours = fsdp.strategy()
    model = workload.transformer()
    model, optimizer = ours.prepare((model, torch.optim.SGD(model.parameters(), lr=1.0)))
    ids = fsdp.ids_of(ours, 0)
    ours.backward(workload.loss_of(model(ids), ids), model, optimizer)
    with torch.no_grad():
        if evaluating:
            model(ids)
        ours.optimizer_step(optimizer, model)
        return model(ids)


def test_an_evaluation_between_backward_and_step_does_not_keep_old_weights():
    assert torch.equal(on(2, _steps_after_evaluating, True)[0], on(2, _steps_after_evaluating, False)[0])


# -- precision --------------------------------------------------------------------------------------------------------


def _dtypes(settings):
    ours = fsdp.strategy(**settings)
    trained = ours.prepare(workload.transformer())
    frozen = ours.prepare(workload.transformer(1).requires_grad_(False))
    optimizer = ours.create_optimizer(trained, lr=1e-3)
    logits = trained(fsdp.ids_of(ours, 0))
    fsdp.step(ours, trained, optimizer, 0)
    stepped = optimizer.param_groups[0]["params"][0]
    return (
        logits.dtype,
        trained.head.weight.dtype,
        frozen.head.weight.dtype,
        stepped.dtype,
        optimizer.state[stepped]["exp_avg"].dtype,
        next(ours.full_parameters(trained))[1].dtype,
    )


@pytest.mark.parametrize(("name", "low"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_kept_in_fp32_or_their_masters_are(name, low):
    full = torch.float32
    assert on(2, _dtypes, {name: True})[0] == (low, full, low, full, full, low)
    assert on(2, _dtypes, {name: True, "use_mp_opt": True})[0] == (low, low, low, full, full, low)


class Overflowing(nn.Module):
    """The last element of ``extra``, which is in the shard of the last rank, has a gradient that fp16 cannot hold."""

    def __init__(self):
        super().__init__()
        self.inner = workload.transformer()
        self.extra = nn.Parameter(torch.zeros(4))
        self.register_buffer("factors", torch.tensor([0.0, 0.0, 0.0, 6e4]))

    def forward(self, ids):
        logits = self.inner(ids)
        more = (self.extra * self.factors.to(self.extra.dtype)).sum()
        return torch.cat([logits[..., :1] + more, logits[..., 1:]], dim=-1)


def _overflows(settings):
    ours = fsdp.strategy(fp16=True, **settings)
    model = Overflowing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, optimizer, scheduler = ours.prepare((model, optimizer, scheduler))
    before = workload.weights(ours, model)
    norms = [fsdp.step(ours, model, optimizer, 0, scheduler)[1]]
    same(workload.weights(ours, model), before, what="after the overflow", within=0.0)
    model.factors.zero_()
    norms.append(fsdp.step(ours, model, optimizer, 1, scheduler)[1])
    return [norm < float("inf") for norm in norms], optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("settings", [{}, {"use_mp_opt": True}, {"use_mp_opt": True, "fsdp_cpu_offload": True}])
def test_k17_an_overflow_in_the_shard_of_one_rank_skips_the_step_on_all(settings):
    assert on(2, _overflows, settings) == [([False, True], 0.05)] * 2


def _scaled():
    ours = fsdp.strategy(fp16=True)
    model = workload.transformer()
    model, optimizer = ours.prepare((model, torch.optim.SGD(model.parameters(), lr=0.1)))
    return fsdp.step(ours, model, optimizer, 0)[1]


def test_the_reported_norm_is_without_the_loss_scale():
    model = workload.transformer()
    ids = workload.batch(0, 4)
    workload.loss_of(model(ids), ids).backward()
    expected = float(nn.utils.get_total_norm([one.grad for one in model.parameters()]))
    assert on(2, _scaled) == pytest.approx([expected] * 2, rel=1e-2)


def _unused(settings):
    ours = fsdp.strategy(**settings)
    model = workload.transformer()
    model.unused = nn.Linear(4, 4)
    model, optimizer = ours.prepare((model, ours.create_optimizer(model, lr=1e-2)))
    before = workload.weights(ours, model)
    norms = [fsdp.step(ours, model, optimizer, number)[1] for number in range(2)]
    after = workload.weights(ours, model)
    return min(norms) > 0, [name for name in before if torch.equal(before[name], after[name])]


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "use_mp_opt": True}])
def test_k17_a_parameter_without_gradient_stays_and_nothing_fails(settings):
    assert on(2, _unused, settings)[0] == (True, ["unused.weight", "unused.bias"])


# -- which optimizer --------------------------------------------------------------------------------------------------


def _refusals():
    ours = fsdp.strategy()
    used = workload.transformer()
    stepped = torch.optim.AdamW(used.parameters())
    used(workload.batch(0, 2)).sum().backward()
    stepped.step()
    model = workload.transformer()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    messages = [_message(lambda: ours.prepare((used, stepped)))]
    messages.append(_message(lambda: ours.prepare((workload.transformer(), early))))
    model = ours.prepare(model)
    messages.append(_message(lambda: ours.backward(model(workload.batch(0, 2)).sum(), model, early)))
    return messages


def _message(call):
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def test_an_optimizer_that_would_step_something_else_is_refused():
    states, other, early = on(2, _refusals)[0]
    assert "has states already" in states
    assert "prepare each model together with its own optimizer" in other
    assert "passed to prepare() with its model, or made again afterwards" in early


def _groups():
    ours = fsdp.strategy(weight_decay=0.1)
    model = workload.transformer()
    optimizer = ours.create_optimizer(model, lr=0.5)
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    _, prepared = ours.prepare((model, optimizer))
    same_sizes = sizes == [len(group["params"]) for group in prepared.param_groups]
    decays = [
        {one.ndim > 1 for one in group["params"]} == {group["weight_decay"] > 0} for group in prepared.param_groups
    ]
    return (
        prepared is optimizer,
        same_sizes,
        decays,
        all(isinstance(one, DTensor) for group in prepared.param_groups for one in group["params"]),
    )


def test_an_optimizer_made_before_keeps_its_groups_over_sharded_parameters():
    assert on(2, _groups)[0] == (True, True, [True, True], True)


# -- moving -----------------------------------------------------------------------------------------------------------


def _moves(settings, moving):
    ours = fsdp.strategy(**settings)
    model = workload.transformer()
    model, optimizer = ours.prepare((model, ours.create_optimizer(model, lr=0.01)))
    pinned = set()
    for number in range(3):
        if moving:
            ours.maybe_load_optimizer(optimizer)
        fsdp.step(ours, model, optimizer, number)
        if moving:
            ours.maybe_offload_optimizer(optimizer)
            ours.offload_model(model)
            states = [one for state in optimizer.state.values() for one in state.values() if one.dim()]
            pinned |= {one.to_local().is_pinned() for one in states}
            with pytest.raises(OffloadStateError):
                fsdp.step(ours, model, optimizer, number)
            ours.reload_model(model)
    return {"weights": workload.weights(ours, model), "pinned": pinned}


@pytest.mark.parametrize(
    ("settings", "cuda"),
    [({}, False), ({}, True), ({"bf16": True, "use_mp_opt": True}, True), ({"fsdp_cpu_offload": True}, True)],
)
def test_moving_states_and_weights_changes_nothing(settings, cuda):
    expected = on(2, _moves, settings, False, cuda=cuda)[0]
    found = on(2, _moves, settings, True, cuda=cuda)[0]
    same(found["weights"], expected["weights"], what="moved", within=0.0)
    assert found["pinned"] == {cuda and "fsdp_cpu_offload" not in settings}


class Waited:
    """A mover of states that counts how often somebody waits for it."""

    def __init__(self):
        self.times = 0

    def wait(self):
        self.times += 1


def _reads_masters():
    ours = fsdp.strategy(bf16=True, use_mp_opt=True)
    models = [workload.transformer(seed) for seed in range(2)]
    pairs = [ours.prepare((model, ours.create_optimizer(model, lr=0.01))) for model in models]
    movers = []
    for model, _ in pairs:
        movers.append(Waited())
        ours.prepared.of(model).backend["sharded"].mover = movers[-1]
    ours.moving_average(pairs[0][0], pairs[1][0])
    return [mover.times > 0 for mover in movers]


def test_an_average_waits_for_masters_that_are_on_their_way():
    assert on(2, _reads_masters) == [[True, True]] * 2


def _allocations():
    ours = fsdp.strategy()
    model = workload.transformer()
    model, optimizer = ours.prepare((model, ours.create_optimizer(model, lr=0.01)))
    fsdp.step(ours, model, optimizer, 0)
    ours.maybe_offload_optimizer(optimizer)
    works, streams = torch.empty_like, []

    def empty_like(*args, **kwargs):
        streams.append(torch.cuda.current_stream())
        return works(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", empty_like)
        ours.maybe_load_optimizer(optimizer)
    return {stream == torch.cuda.default_stream() for stream in streams}, len(streams) > 0


def test_what_is_moved_to_the_device_is_allocated_on_the_stream_that_uses_it():
    assert on(1, _allocations, cuda=True) == [({True}, True)]


# -- averages ---------------------------------------------------------------------------------------------------------


def _averages():
    ours = fsdp.strategy(bf16=True)
    model = ours.prepare_model(workload.transformer(0), is_training=True)
    average = ours.prepare_model(workload.transformer(1).requires_grad_(False))
    for _ in range(600):
        ours.moving_average(model, average, beta=0.998)
    return workload.weights(ours, average)


def test_an_average_in_bf16_moves_by_steps_that_bf16_cannot_show():
    ours, theirs = (dict(workload.transformer(seed).named_parameters())["head.weight"].detach() for seed in (0, 1))
    expected = ours + 0.998**600 * (theirs.bfloat16().float() - ours)
    found = on(2, _averages)[0]["head.weight"]
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-2)
