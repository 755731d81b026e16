"""ST401 and on: moving models and optimizers between devices."""

from __future__ import annotations

from typing import Any

import torch

from lightrft.errors import ConfigError, OffloadStateError
from lightrft.sim.contracts.strategy import workload
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.subject import Make, Subject, refused
from lightrft.sim.contracts.strategy.workload import Recipe

RECIPE = Recipe(optimizer="adamw", steps=1)


def _started(make: Make) -> tuple[Any, Any, Any, Any]:
    strategy = make(max_norm=0.0)
    model = workload.transformer()
    model, optimizer, _ = strategy.prepare((model, RECIPE.make(model.parameters()), None))

    def step(number: int) -> None:
        for ids in workload.micro_batches(strategy, number, strategy.groups.dp_size):
            strategy.backward(workload.loss_of(model(ids), ids), model, optimizer)
            strategy.optimizer_step(optimizer, model, None)

    return strategy, model, optimizer, step


def _round_trips(make: Make, moves: str) -> dict[str, torch.Tensor]:
    strategy, model, optimizer, step = _started(make)
    for number in range(3):
        if moves == "optimizer":
            strategy.maybe_load_optimizer(optimizer)
        step(number)
        if moves == "optimizer":
            strategy.maybe_offload_optimizer(optimizer)
        if moves == "model":
            strategy.offload_model(model)
            strategy.reload_model(model)
    return workload.weights(strategy, model)


@contract.check(401, "moves_optimizer")
def check_an_offloaded_optimizer_changes_nothing(subject: Subject) -> None:
    """Training with the optimizer moved out and back in each iteration ends on the same weights, exactly."""
    _same_as_without(subject, "optimizer")


@contract.check(402, "moves_model")
def check_an_offloaded_model_changes_nothing(subject: Subject) -> None:
    """Training with the model moved out and back in each iteration ends on the same weights, exactly."""
    _same_as_without(subject, "model")


def _same_as_without(subject: Subject, moves: str) -> None:
    for found, expected in zip(subject.run(_round_trips, moves), subject.run(_round_trips, "nothing"), strict=True):
        workload.same(found, expected, what=f"with the {moves} moved", within=0.0)


def _twice_optimizer(make: Make) -> list[str]:
    strategy, model, optimizer, step = _started(make)
    step(0)
    strategy.maybe_load_optimizer(optimizer)  # nothing to load yet: an iteration may begin so
    strategy.maybe_offload_optimizer(optimizer)
    found = [refused(lambda: strategy.maybe_offload_optimizer(optimizer), OffloadStateError)]
    found.append(refused(lambda: step(1), OffloadStateError))
    strategy.maybe_load_optimizer(optimizer)
    found.append(refused(lambda: strategy.maybe_load_optimizer(optimizer), OffloadStateError))
    del model
    return found


@contract.check(403, "moves_optimizer")
def check_optimizer_moves_come_in_pairs(subject: Subject) -> None:
    """The second offload, the second load and a step in between are errors that name both places (K26)."""
    for found in subject.run(_twice_optimizer):
        for message in found:
            if message.count(".py:") < 2:
                raise AssertionError(f"expected two places in {message!r}")


def _twice_model(make: Make) -> list[str]:
    strategy, model, _, step = _started(make)
    found = [refused(lambda: strategy.reload_model(model), OffloadStateError)]
    strategy.offload_model(model)
    found.append(refused(lambda: strategy.offload_model(model), OffloadStateError))
    found.append(
        refused(lambda: strategy.backward(torch.zeros((), requires_grad=True), model, None), OffloadStateError)
    )
    strategy.reload_model(model)
    step(0)
    return found


@contract.check(404, "moves_model")
def check_model_moves_come_in_pairs(subject: Subject) -> None:
    """The second offload, a reload without one and training in between are errors that name the places (K26)."""
    for found in subject.run(_twice_model):
        for message, places in zip(found, (1, 2, 2), strict=True):
            if message.count(".py:") < places:
                raise AssertionError(f"expected {places} places in {message!r}")


def _strange(make: Make) -> str:
    strategy = make()
    other = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    strategy.report_memory(prefix="before")
    strategy.sync_and_clear_cache()
    return refused(lambda: strategy.maybe_offload_optimizer(other), ConfigError)


@contract.check(405)
def check_a_strange_optimizer_is_refused(subject: Subject) -> None:
    """An optimizer that the strategy does not know is an error that says which one to pass."""
    for message in subject.run(_strange):
        if "prepare" not in message:
            raise AssertionError(f"expected a hint at prepare in {message!r}")
