"""FakeStrategy refuses, counts and restores what the backends that it mirrors do."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightrft.errors import CheckpointError, CollectiveMismatchError, ConfigError, RankFailedError
from lightrft.sim import SimWorld, fake_checkpoints
from lightrft.sim.contracts.strategy import SETTINGS, workload
from lightrft.strategy import get_strategy

pytestmark = pytest.mark.filterwarnings("ignore")  # of deepspeed, and of torch about what it calls
EVERY = pytest.mark.parametrize("name", SETTINGS)


def run(size, program, name, *args, **settings):
    return SimWorld(size, stall_limit=15).run(_alone, program, {**SETTINGS[name], **settings}, args)


def _alone(program, settings, args):
    size = int(os.environ["WORLD_SIZE"])
    try:
        return program(get_strategy({"train_batch_size": size, "max_norm": 0.0, **settings}), *args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


# -- What is refused --------------------------------------------------------------------------------------------------


def _shards(strategy, shard_size, training):
    model = workload.transformer().requires_grad_(training)
    try:
        strategy.prepare_model(model, is_training=training, shard_size=shard_size)
    except ConfigError as error:
        return str(error)
    return "prepared"


@pytest.mark.parametrize(("fake", "real"), [("fake, as DeepSpeed", "ZeRO-2"), ("fake, as FSDP", "FSDP")])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shard_size", [-1, 0, 1, 2, 3, 4, 8])
def test_k19_shard_sizes_are_refused_as_they_are_by_what_is_mirrored(fake, real, shard_size, training):
    found = run(4, _shards, fake, shard_size, training)
    assert found == run(4, _shards, real, shard_size, training)
    fits = shard_size in {-1, 4} or (shard_size in {1, 2} and not (training and real == "ZeRO-2"))
    assert found == ["prepared"] * 4 if fits else "prepared" not in found


# -- A parameter that some ranks reach --------------------------------------------------------------------------------


class Branching(nn.Module):
    """Its second parameter takes part only if it is told so."""

    def __init__(self):
        super().__init__()
        self.always, self.sometimes = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x, both):
        return (self.always * x).sum() + ((self.sometimes * x).sum() if both else 0)


def _branches(strategy, ranks):
    model = Branching()
    model, optimizer, _ = strategy.prepare((model, torch.optim.AdamW(model.parameters(), lr=0.1), None))
    strategy.backward(model(torch.ones(4), strategy.get_rank() in ranks), model, optimizer)
    return strategy.optimizer_step(optimizer, model)


@EVERY
@pytest.mark.parametrize("rank", [0, 1])
def test_f11_a_parameter_that_the_loss_reaches_on_one_rank_alone_is_an_error(name, rank):
    with pytest.raises((CollectiveMismatchError, RankFailedError), match="differ|sometimes"):
        run(2, _branches, name, [rank])


@EVERY
@pytest.mark.parametrize("ranks", [[], [0, 1]])
def test_a_parameter_that_no_rank_or_every_rank_reaches_is_fine(name, ranks):
    expected = (4 + 4 * bool(ranks)) ** 0.5
    assert run(2, _branches, name, ranks) == pytest.approx([expected] * 2, rel=1e-6)


# -- What a checkpoint keeps ------------------------------------------------------------------------------------------


def _changed(strategy, folder):
    model = workload.transformer()
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=0.5), None))
    for number, group in enumerate(optimizer.param_groups):
        group |= {"lr": 0.125 * (number + 1), "betas": (0.5, 0.75), "eps": 1e-3}
    strategy.save_ckpt(model, folder)


def _resumed(strategy, folder, options):
    model = workload.transformer()
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=0.5), None))
    strategy.load_ckpt(model, folder, **options)
    return [(group["lr"], tuple(group["betas"]), group["eps"]) for group in optimizer.param_groups]


@EVERY
@pytest.mark.parametrize("size", [1, 2, 4])
def test_k15_the_settings_of_the_optimizer_are_restored_at_any_number_of_ranks(name, size, tmp_path):
    run(2, _changed, name, tmp_path)
    expected = [(0.125, (0.5, 0.75), 1e-3), (0.25, (0.5, 0.75), 1e-3)]
    assert run(size, _resumed, name, tmp_path, {}) == [expected] * size
    fresh = [(0.5, (0.9, 0.95), 1e-8)] * 2
    assert run(size, _resumed, name, tmp_path, {"load_optimizer_states": False}) == [fresh] * size


def _scaled(strategy, folder, saving):
    model = workload.transformer()
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=0.01), None))
    for step in range(3 if saving else 0):
        ids = workload.batch(step, 2)
        loss = workload.loss_of(model(ids), ids) * (float("inf") if step < 2 else 1.0)
        strategy.backward(loss, model, optimizer)
        strategy.optimizer_step(optimizer, model)
    if saving:
        strategy.save_ckpt(model, folder)
    else:
        strategy.load_ckpt(model, folder)
    scale = strategy.prepared.of(model).backend["loss_scale"]
    return scale.scale, scale.good_steps


@pytest.mark.parametrize("name", ["fake, as DeepSpeed", "fake, as FSDP"])
def test_the_loss_scale_of_a_fake_goes_on_where_it_was(name, tmp_path):
    expected = [(2.0**14, 1)] * 2
    assert run(2, _scaled, name, tmp_path, True, fp16=True) == expected
    assert run(2, _scaled, name, tmp_path, False, fp16=True) == expected


def _other_groups(strategy, folder):
    model = workload.transformer()
    model, _, _ = strategy.prepare((model, torch.optim.SGD(model.parameters(), lr=0.1), None))
    with pytest.raises(CheckpointError, match="2 parameter groups, and this one 1"):
        strategy.load_ckpt(model, folder)


@pytest.mark.parametrize("name", ["fake, as DeepSpeed", "ZeRO-2"])
def test_as_deepspeed_another_number_of_groups_is_refused(name, tmp_path):
    run(2, _changed, name, tmp_path)
    run(2, _other_groups, name, tmp_path)


def _unreadable(strategy, folder, patch):
    model = workload.transformer()
    model, _, _ = strategy.prepare((model, strategy.create_optimizer(model), None))
    strategy.save_ckpt(model, folder)
    dist.barrier()
    patch()
    with pytest.raises(CheckpointError, match="rank 1: .*damaged"):
        strategy.load_ckpt(model, folder)


@pytest.mark.parametrize(("name", "reads"), [("fake, as DeepSpeed", "_load"), ("fake, as FSDP", "_read_dcp")])
def test_k10_a_file_that_one_rank_cannot_read_is_an_error_on_all(name, reads, tmp_path, monkeypatch):
    works = getattr(fake_checkpoints, reads)

    def read(path):
        if dist.get_rank() == 1:
            raise EOFError("damaged")
        return works(path)

    run(2, _unreadable, name, tmp_path, lambda: monkeypatch.setattr(fake_checkpoints, reads, read))
