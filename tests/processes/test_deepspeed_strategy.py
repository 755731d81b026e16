"""DeepspeedStrategy on real gloo processes: the same numbers as on simulated ranks, and nothing is compiled."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from programs import tiny

from lightrft.sim import ProcessWorld, SimWorld
from lightrft.strategy import get_strategy

pytestmark = [pytest.mark.processes, pytest.mark.filterwarnings("ignore")]
STAGES = pytest.mark.parametrize("stage", [1, 2, 3])


def _strategy(stage, **settings):
    size = int(os.environ["WORLD_SIZE"])
    return get_strategy({"zero_stage": stage, "train_batch_size": 2 * size, "max_norm": 0.0, **settings})


def _weights(strategy, model):
    return {name: tensor.float().cpu().clone() for name, tensor in strategy.full_parameters(model)}


def _train(strategy, model, optimizer, steps, first=0):
    losses, norms = [], []
    for number in range(2 * first, 2 * (first + steps)):
        ids = tiny.batch(number, 0)
        loss = tiny.loss_of(model(ids), ids)
        strategy.backward(loss, model, optimizer)
        norm = strategy.optimizer_step(optimizer, model)
        losses.append(float(loss))
        norms += [] if norm is None else [norm]
    return losses, norms


def _trained(stage, settings):
    strategy = _strategy(stage, **settings)
    model = tiny.transformer()
    model, optimizer, _ = strategy.prepare((model, tiny.sgd(model.parameters()), None))
    losses, norms = _train(strategy, model, optimizer, 3)
    result = losses, norms, _weights(strategy, model)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _farthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@STAGES
def test_processes_and_simulated_ranks_train_alike(stage):
    losses, norms, weights = ProcessWorld(2).run(_trained, stage, {})[0]
    expected = SimWorld(2).run(_trained, stage, {})[0]
    assert losses == pytest.approx(expected[0], abs=2e-6)
    assert norms == pytest.approx(expected[1], rel=1e-6)
    assert _farthest(weights, expected[2]) < 1e-6


@STAGES
def test_float16_works_on_cpus_that_deepspeed_calls_too_slow_for_it(stage):
    losses, _, _ = ProcessWorld(2).run(_trained, stage, {"fp16": True})[0]
    expected, _, _ = SimWorld(2).run(_trained, stage, {})[0]
    assert losses == pytest.approx(expected, abs=2e-3)


def _saves(stage, folder):
    strategy = _strategy(stage)
    model = tiny.transformer()
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=0.01, eps=1e-5), None))
    _train(strategy, model, optimizer, 2)
    strategy.save_ckpt(model, folder)
    saved = _weights(strategy, model)
    _train(strategy, model, optimizer, 2, first=2)
    result = type(optimizer).__name__, saved, _weights(strategy, model)
    dist.barrier()
    dist.destroy_process_group()
    return result


def _loads(stage, folder):
    strategy = _strategy(stage)
    model = tiny.transformer(seed=1)
    model, optimizer, _ = strategy.prepare((model, strategy.create_optimizer(model, lr=0.5), None))
    strategy.load_ckpt(model, folder)
    loaded = _weights(strategy, model)
    _train(strategy, model, optimizer, 2, first=2)
    result = type(optimizer).__name__, loaded, _weights(strategy, model)
    dist.barrier()
    dist.destroy_process_group()
    return result


@pytest.mark.parametrize(("saving", "loading"), [(1, 3), (3, 2)])
def test_f19_processes_go_on_from_what_simulated_ranks_saved_and_the_other_way_round(saving, loading, tmp_path):
    """The optimizers differ: simulated ranks have DeepSpeed's fused one, a machine without CUDA has PyTorch's."""
    for worlds, name in (((SimWorld(4), ProcessWorld(2)), "there"), ((ProcessWorld(2), SimWorld(1)), "back")):
        folder = str(tmp_path / name)
        used, saved, ended = worlds[0].run(_saves, saving, folder)[0]
        other, loaded, end = worlds[1].run(_loads, loading, folder)[0]
        if not torch.cuda.is_available():
            assert {used, other} == {"FusedAdam", "AdamW"}
        assert _farthest(loaded, saved) == 0
        assert _farthest(end, ended) < 5e-5


def _builds(stage, settings):
    strategy = _strategy(stage, bf16=True, **settings)
    torch.manual_seed(0)
    with strategy.init_model_context():
        model = tiny.Transformer()
    dtypes = {parameter.dtype for parameter in model.parameters()}
    model = strategy.prepare(model)
    optimizer = strategy.create_optimizer(model)
    ids = tiny.batch(0)
    strategy.backward(tiny.loss_of(model(ids), ids), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    compiled = [name for name in sys.modules if name.startswith("deepspeed.ops") and name.endswith("_op")]
    from deepspeed.ops.op_builder.builder import OpBuilder

    loaded = sorted(OpBuilder._loaded_ops)
    dist.barrier()
    dist.destroy_process_group()
    return dtypes, compiled, loaded


def test_models_are_built_in_the_dtype_of_the_run_and_nothing_is_compiled():
    dtypes, compiled, loaded = ProcessWorld(2).run(_builds, 3, {"adam_offload": True})[0]
    assert dtypes == {torch.bfloat16}
    if not torch.cuda.is_available():
        assert compiled == loaded == []


def _alone(stage):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    strategy = get_strategy({"train_batch_size": 2, "zero_stage": stage})
    model = strategy.prepare(tiny.transformer())
    optimizer = strategy.create_optimizer(model)
    losses, _ = _train(strategy, model, optimizer, 2)
    left = "LOCAL_RANK" in os.environ
    dist.destroy_process_group()
    return strategy.world_size, len(losses), left


@STAGES
def test_a_process_that_no_launcher_started_trains_alone(stage):
    assert ProcessWorld(1).run(_alone, stage) == [(1, 4, False)]
