"""What ranks do with DeepspeedStrategy: strategies, their worlds, and the training of a tiny model."""

from __future__ import annotations

import os

import torch.distributed as dist

from lightrft.sim import SimWorld
from lightrft.strategy import get_strategy
from programs import tiny


def make(stage, *, accumulation=1, **settings):
    size = int(os.environ["WORLD_SIZE"])
    return get_strategy({"zero_stage": stage, "train_batch_size": accumulation * size, "max_norm": 0.0, **settings})


def run(size, program, *args, **settings):
    results = SimWorld(size, stall_limit=15).run(_alone_in_its_world, program, args, settings)
    return results[0]


def _alone_in_its_world(program, args, settings):
    try:
        return program(*args, **settings)
    finally:
        dist.destroy_process_group()


def weights(strategy, model):
    return {name: tensor.float().clone() for name, tensor in strategy.full_parameters(model)}


def farthest(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def train(strategy, model, optimizer, scheduler=None, *, steps=2, first=0):
    """Losses of this rank; a step has as many micro-batches as the strategy accumulates."""
    losses = []
    for number in range(first * strategy.accumulated_gradient, (first + steps) * strategy.accumulated_gradient):
        ids = tiny.batch(number)
        loss = tiny.loss_of(model(ids), ids)
        strategy.backward(loss, model, optimizer)
        strategy.optimizer_step(optimizer, model, scheduler)
        losses.append(float(loss))
    return losses
