"""Strategies that are wrong in one way each are caught by the contract."""

import pytest
import torch

from lightrft.sim import SimWorld, fake_checkpoints, flat_parameters
from lightrft.sim import strategy as fake
from lightrft.sim.contracts.strategy import CHECKS, SETTINGS, Subject
from lightrft.strategy import backend_strategy, engine
from lightrft.strategy.groups import ParallelGroups
from lightrft.strategy.utils import checkpoints, collectives, moving_average
from lightrft.strategy.utils.sequence_parallel import exchange, processor

Flat, Fake, Backend = flat_parameters.FlatParameters, fake.FakeStrategy, backend_strategy.BackendStrategy
CHECK = {check.number: check for check in CHECKS}


def _doubled(reduce):
    return lambda self, divisor: reduce(self, divisor / 2)


def _own_norm(reduce):
    def reduced(self, divisor):
        reduce(self, divisor)
        return self._gradient.square().sum()

    return reduced


def _applied(step):
    def stepped(self, prepared):
        found = step(self, prepared)
        return backend_strategy.Step(norm=found.norm, applied=True)

    return stepped


def _without_states(part):
    return lambda optimizer, flat: part(None, flat)


def _first_only(parameters):
    return lambda self, model: list(parameters(self, model))[:1]


def _listed(prepare):
    def prepared(self, *given, **more):
        found = prepare(self, *given, **more)
        return [list(one) if isinstance(one, tuple) else one for one in found] if isinstance(found, list) else found

    return prepared


def _unscaled(gather):
    def gathered(values, group):
        found = gather(values, group)
        return found.detach() + (found - found.detach()) / group.size()

    return gathered


def _shifted(make):
    def made(cls, world_size, rank, **sizes):
        return make.__func__(cls, world_size, world_size - 1 - rank, **sizes)

    return classmethod(made)


MUTATIONS = {
    # what is wrong: the check that sees it, what is replaced, and how the original becomes the broken one
    "gradients are twice as large": ("ST101", Flat, "reduce_gradients", _doubled),
    "the norm is that of one rank": ("ST103", Flat, "reduce_gradients", _own_norm),
    "nothing is clipped": ("ST103", Flat, "scale_gradients", lambda f: lambda self, factor: None),
    "dropped gradients stay": ("ST106", Backend, "drop_partial_accumulation", lambda f: lambda self, model: 1),
    "ranks keep their own weights": ("ST101", Flat, "_gather", lambda f: lambda self: None),
    "a skipped step counts as one": ("ST108", Fake, "_step", _applied),
    "a mean is a sum": ("ST201", collectives, "all_reduce", lambda f: lambda data, op, **k: f(data, "sum", **k)),
    "ranks are counted from the end": ("ST204", ParallelGroups, "make", _shifted),
    "averages move too fast": ("ST208", moving_average, "update", lambda f: lambda a, b, beta, d: f(a, b, 1 - beta, d)),
    "averages are kept in 16 bits": (
        "ST209", moving_average.FineAverages, "_of", lambda f: lambda self, average, device: average,
    ),
    "checkpoints lack the optimizer": ("ST301", fake_checkpoints, "optimizer_part", _without_states),
    "random numbers start anew": (
        "ST301", checkpoints.CheckpointFolder, "restore_random_state", lambda f: lambda self, path: None,
    ),
    "schedules start anew": ("ST301", backend_strategy, "_resume_schedule", lambda f: lambda scheduler, state: None),
    "the first rank's part is everybody's": (
        "ST302", fake_checkpoints, "joined", lambda f: lambda parts: f(parts[:1] * len(parts)),
    ),
    "a model is saved in part": ("ST307", Fake, "full_parameters", _first_only),
    "moves are not counted": ("ST403", Backend, "_refuse_offloaded", lambda f: lambda self, prepared: None),
    "sleep is asked for twice": ("ST502", engine, "put_to_sleep", lambda f: lambda engine: engine.sleep()),
    "tuples become lists": ("ST602", Backend, "prepare", _listed),
    "gathered log-probs have a share of the gradient": ("ST801", processor, "gather_sequence", _unscaled),
}  # fmt: skip


@pytest.mark.parametrize("wrong", MUTATIONS)
def test_a_wrong_strategy_is_caught(wrong, monkeypatch):
    number, owner, name, broken = MUTATIONS[wrong]
    subject = Subject(world=SimWorld, settings=SETTINGS["fake, as DeepSpeed"], name="broken", size=2)
    original = owner.__dict__[name]
    monkeypatch.setattr(owner, name, broken(original))
    with pytest.raises(Exception):  # noqa: B017, PT011 - in whatever way, it is seen
        CHECK[number](subject)
    monkeypatch.undo()
    CHECK[number](subject)


def test_the_gathering_that_is_broken_above_is_the_real_one():
    assert processor.gather_sequence is exchange.gather_sequence
    assert torch.is_grad_enabled()
