"""Strategies that are wrong in one way each are caught by the contract, with a message that says what is wrong."""

import pytest
import torch
from programs import breakages as broken

from lightrft.sim import SimWorld, fake_checkpoints, flat_parameters
from lightrft.sim import strategy as fake
from lightrft.sim.contracts.strategy import CHECKS, SETTINGS, Subject
from lightrft.strategy import backend_strategy, engine, engine_calls, packing, rollout, weight_sync
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.groups import ParallelGroups
from lightrft.strategy.utils import (
    checkpoint_store,
    checkpoints,
    collectives,
    data,
    moving_average,
    optimizers,
    schedulers,
    seeds,
    sequence_parallel,
)
from lightrft.strategy.utils.sequence_parallel import exchange, processor

Flat, Fake, Backend = flat_parameters.FlatParameters, fake.FakeStrategy, backend_strategy.BackendStrategy
CHECK = {check.number: check for check in CHECKS}


MUTATIONS = {
    # what is wrong: the check that sees it, its message, what is replaced, and how the original becomes the broken one
    "gradients are twice as large": (
        "ST101", "rank 0: the loss of step 1", Flat, "reduce_gradients", broken.doubled,
    ),
    "ranks keep their own weights": (
        "ST101", "rank 0: the loss of step 1", Flat, "_gather", broken.returns(None),
    ),
    "micro-batches are not averaged": (
        "ST102", "rank 0: the loss of step 1", Flat, "reduce_gradients", broken.added_up,
    ),
    "the norm is that of one rank": ("ST103", "rank 0: the loss of step 1", Flat, "reduce_gradients", broken.own_norm),
    "nothing is clipped": ("ST103", "the loss of step 1 is", Flat, "scale_gradients", broken.returns(None)),
    "weights do not decay": ("ST104", "rank 0: .* in one plain process", Fake, "_apply", broken.without_decay),
    "every micro-batch is a step": (
        "ST105", "stepped after these micro-batches", Backend, "optimizer_step",
        lambda f: lambda *args, **kwargs: f(*args, **kwargs) or 0.0,
    ),
    "dropped gradients stay": (
        "ST106", "with the warnings \\[\\]", Backend, "drop_partial_accumulation", broken.returns(1),
    ),
    "rates reach no weight": ("ST107", "the loss of step 2 is", Fake, "_apply", broken.rate_of_the_start),
    "a skipped step counts as one": (
        "ST108", r"each of two steps: \[0.005, 0.0, 0.0025", Fake, "_step", broken.applied,
    ),
    "a skipped step moves weights": (
        "ST108", "after a step that is skipped: .* differs", Fake, "_step", broken.steps_nevertheless,
    ),
    "what is not reached counts": (
        "ST109", "the norm is .* without the parameter", Flat, "reduce_gradients", broken.counted_in,
    ),
    "any shard size is taken": (
        "ST110", "expected ConfigError, and it returned", Backend, "_check_shard_size", broken.returns(None),
    ),
    "tied weights are untied": ("ST111", "tied weights: .* in one plain process", Fake, "_shard", broken.untied),
    "only the first model is trained": (
        "ST112", "the second of two models: .* differs", Fake, "_apply", broken.first_model_only,
    ),
    "16 bits are asked for and not used": (
        "ST113", "expected torch.bfloat16, and the model computes in torch.float32", Fake, "_compute_dtype",
        lambda original: None,
    ),
    "16 bits train nothing": ("ST113", "losses .* in float32", Fake, "_apply", broken.returns(None)),
    "norms have the loss scale": ("ST114", "norms .* in float32", Fake, "_step", broken.with_the_loss_scale),
    "settings of Adam are not read": (
        "ST115", "the first step moved weights by", optimizers, "adamw_settings",
        lambda f: lambda config, given: f(StrategyConfig(), given),
    ),
    "a mean is a sum": (
        "ST201", "mean, max, min and sum are", collectives, "all_reduce",
        lambda f: lambda data, op, **k: f(data, "sum", **k),
    ),
    "other keys are passed over": (
        "ST202", "expected ConfigError, and it returned", collectives, "all_reduce", broken.nearly_the_same,
    ),
    "the ranks are gathered backwards": (
        "ST203", "gathered", collectives, "all_gather", broken.of_dicts_backwards,
    ),
    "ranks are counted from the end": ("ST204", "rank 0 knows", ParallelGroups, "make", broken.shifted),
    "any size of the world will do": (
        "ST205", "the new group's world size should be less", StrategyConfig, "check_world", broken.returns(None),
    ),
    "ranks are seeded apart": (
        "ST206", "random numbers after seeding", seeds, "set_seed",
        lambda f: lambda seed: f(seed + torch.distributed.get_rank()),
    ),
    "loaders begin anew": (
        "ST207", "does not go on", data, "setup_dataloader",
        lambda f: lambda *args, consumed_samples, **more: f(*args, consumed_samples=0, **more),
    ),
    "averages move too fast": (
        "ST208", "average are off by", moving_average, "update", lambda f: lambda a, b, beta, d: f(a, b, 1 - beta, d),
    ),
    "averages are kept in 16 bits": (
        "ST209", "a frozen, a trained and a plain average are off by", moving_average.FineAverages, "_of",
        lambda f: lambda self, average, device: average,
    ),
    "checkpoints lack the optimizer": (
        "ST301", "resumed after step 1: .* differs", fake_checkpoints, "optimizer_part", broken.without_states,
    ),
    "random numbers start anew": (
        "ST301", "resumed after step 1: .* differs", checkpoints.CheckpointFolder, "restore_random_state",
        broken.returns(None),
    ),
    "all ranks go on with the random numbers of the first": (
        "ST301", "resumed after step 1: .* differs", checkpoints, "load_random_state", broken.of_rank_0,
    ),
    "schedules start anew": (
        "ST301", "resumed after step 1: .* differs", backend_strategy, "_resume_schedule", broken.returns(None),
    ),
    "the first rank's part is everybody's": (
        "ST302", "loaded by 1 ranks: .* differs", fake_checkpoints, "joined",
        lambda f: lambda parts: f(parts[:1] * len(parts)),
    ),
    "old checkpoints stay": (
        "ST303", r"expected \['global_step1'", checkpoint_store.CheckpointStore, "rotate", broken.returns(None),
    ),
    "any tag will do": (
        "ST304", "'../up' was not saved in .* No such file", checkpoints, "check_tag", lambda f: lambda tag: tag,
    ),
    "all parts are loaded": ("ST305", "client state, fresh", Backend, "load_ckpt", broken.whatever_is_asked),
    "any checkpoint will do": (
        "ST306", "expected CheckpointError, and it returned", Fake, "_read", broken.returns(None),
    ),
    "a model is saved in part": ("ST307", "expected weights", Fake, "full_parameters", broken.first_only),
    "checkpoints are of any size": (
        "ST308", "room for 2, 2, 1 and no checkpoint leaves", checkpoint_store, "_small", broken.returns(True),
    ),
    "an optimizer that is moved forgets": (
        "ST401", "at each move: \\[False", Fake, "_move_optimizer", broken.forgets_states,
    ),
    "micro-batches survive a move of the optimizer": (
        "ST401", "with moves: .* differs", Backend, "drop_partial_accumulation", broken.returns(0),
    ),
    "micro-batches survive a move of the model": (
        "ST402", "moved out and back: .* differs", Backend, "drop_partial_accumulation", broken.returns(0),
    ),
    "a model that is moved is rounded": ("ST402", "moved out and back: .* differs", Fake, "_move_model", broken.rounds),
    "moves are not counted": (
        "ST403", "expected OffloadStateError, and it returned None", Backend, "_refuse_offloaded", broken.returns(None),
    ),
    "a refused move is made": (
        "ST403", "moves that were refused: .* differs", Backend, "maybe_offload_optimizer", broken.moves_and_refuses,
    ),
    "models are trained while they are away": (
        "ST404", "expected OffloadStateError, and it returned None", Backend, "_refuse_offloaded", broken.returns(None),
    ),
    "strange optimizers are moved": (
        "ST405", "expected ConfigError, and it returned", Backend, "maybe_offload_optimizer", broken.returns(None),
    ),
    "any type of engine will do": (
        "ST501", "'the engine needs a model", engine, "check_engine_type", lambda f: lambda engine_type: engine_type,
    ),
    "sleep is asked for twice": (
        "ST502", "'sleep 1', 'sleep 1'", engine, "put_to_sleep", lambda f: lambda engine, level=1: engine.sleep(level),
    ),
    "weights are sent under other names": (
        "ST503", "update 1, .* module.embedding.weight", Fake, "full_parameters", broken.prefixed,
    ),
    "frozen weights are not sent": (
        "ST503", "update 2, .*: blocks.0.inputs.weight", Fake, "full_parameters", broken.trained_only,
    ),
    "tied weights are sent twice": (
        "ST503", "update 1, tied=True: .*: head.weight", Fake, "full_parameters", broken.tied_ones_twice,
    ),
    "former weights are sent": (
        "ST503", "after a step the engine still has the former", Fake, "full_parameters", broken.as_at_first,
    ),
    "the first actor is sent for ever": (
        "ST503", "update 2, tied=False", engine_calls.EngineCalls, "update_engine_weights", broken.first_actor_for_ever,
    ),
    "caches outlive their weights": ("ST503", "the engine was asked", weight_sync, "send", broken.without_reset),
    "weights are sent to an engine that sleeps": (
        "ST503", "update_weights: the engine is asleep", engine, "wake_weights", broken.returns(None),
    ),
    "all weights are one bucket": (
        "ST504", "buckets of \\[1920000\\] bytes", weight_sync, "in_buckets", broken.one_bucket,
    ),
    "completions are in another order": ("ST505", "rank 1 got", rollout, "gather_and_generate", broken.backwards),
    "prompts are not gathered": ("ST505", "the engine of rank 0 got", packing, "sent", broken.own_prompts_only),
    "an error of an engine stays with its rank": (
        "ST506", "no memory left", engine_calls, "Ranks", lambda f: broken.Alone,
    ),
    "what a deep sleep drops stays dropped": (
        "ST507", "generate: the weights were dropped", engine_calls.EngineCalls, "_send_what_was_dropped",
        broken.returns(None),
    ),
    "every sleep is light": (
        "ST507", "expected StaleWeightsError, and it returned", engine, "put_to_sleep",
        lambda f: lambda engine, level=1: f(engine),
    ),
    "weights that are sent again end an accumulation": (
        "ST507", "sent again after a step: .* differs", engine_calls.EngineCalls, "_send_what_was_dropped",
        lambda f: lambda self: (self._in_engine and self.drop_partial_accumulation(self._in_engine()), f(self)),
    ),
    "what is around a model stays around it": (
        "ST601", r"unwrapped: \[\[True, True\], True, \[False, False\]\]", Fake, "unwrap_model",
        lambda f: lambda self, model: model,
    ),
    "tuples become lists": ("ST602", "found \\[\\[False, False", Backend, "prepare", broken.listed),
    "schedules are left out": (
        "ST603", "found \\[\\[0.01, 0.02\\], True, False", schedulers, "make", broken.returns(None),
    ),
    "whole models are rounded": (
        "ST604", "other outputs with shard_size=-1", Fake, "_cast", broken.rounding(torch.nn.Module.parameters),
    ),
    "shared models are rounded": (
        "ST605", "other outputs with shard_size=2", Fake, "_cast", broken.rounding(torch.nn.Module.parameters),
    ),
    "models built in context are rounded": (
        "ST606", "built with meta_init=False: .* differs", Fake, "_cast", broken.rounding(torch.nn.Module.parameters),
    ),
    "pretrained weights are rounded": (
        "ST607", "meta_init=False: .* differs", Fake, "_cast", broken.rounding(torch.nn.Module.parameters),
    ),
    "buffers of pretrained models are rounded": (
        "ST607", "meta_init=False: logits differ", Fake, "_cast", broken.rounding(torch.nn.Module.buffers),
    ),
    "gradients are twice as large in ten steps": (
        "ST701", "SGD, 1 micro-batches a step: the loss of step 1", Flat, "reduce_gradients", broken.doubled,
    ),
    "gathered log-probs have a share of the gradient in ten steps": (
        "ST702", "SGD, 1 micro-batches a step, sp_size 2", processor, "gather_sequence", broken.unscaled,
    ),
    "gathered log-probs have a share of the gradient": (
        "ST801", "two ranks a sequence: the loss of step 1", processor, "gather_sequence", broken.unscaled,
    ),
    "attention that cannot be changed stays as it is": (
        "ST802", "expected ConfigError, and it returned", sequence_parallel, "enable", broken.returns(None),
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_strategy_is_caught(wrong, monkeypatch):
    number, message, owner, name, make = MUTATIONS[wrong]
    size = 4 if number == "ST605" else 2
    subject = Subject(world=SimWorld, settings=SETTINGS["fake, as DeepSpeed"], name="broken", size=size)
    monkeypatch.setattr(owner, name, make(owner.__dict__[name]))
    with pytest.raises(Exception, match=f"(?s){message}"):
        CHECK[number](subject)


def test_every_check_sees_something():
    assert {number for number, *_ in MUTATIONS.values()} == CHECK.keys()


def test_the_gathering_that_is_broken_above_is_the_real_one():
    assert processor.gather_sequence is exchange.gather_sequence
    assert torch.is_grad_enabled()
