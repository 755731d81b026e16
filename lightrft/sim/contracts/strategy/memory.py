"""ST401 and on: moving models and optimizers between devices."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from lightrft.errors import ConfigError, OffloadStateError
from lightrft.sim.contracts.strategy import workload
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.subject import Make, Subject, refused
from lightrft.sim.contracts.strategy.workload import Recipe

RECIPE = Recipe(optimizer="adamw", steps=1)


class Run:
    """Training of two micro-batches a step.

    Args:
        make: makes its strategy.
    """

    def __init__(self, make: Make) -> None:
        self.strategy = make(max_norm=0.0, train_batch_size=2 * make.world_size, micro_train_batch_size=1)
        model = workload.transformer()
        self.model, self.optimizer, _ = self.strategy.prepare((model, RECIPE.make(model.parameters()), None))

    def step(self, number: int, micro_batches: int = 2) -> None:
        """One step, or the beginning of it."""
        several = workload.micro_batches(self.strategy, number, 2 * self.strategy.world_size)
        for ids in itertools.islice(several, micro_batches):
            self.strategy.backward(workload.loss_of(self.model(ids), ids), self.model, self.optimizer)
            self.strategy.optimizer_step(self.optimizer, self.model, None)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """Whole."""
        return workload.weights(self.strategy, self.model)

    @property
    def home(self) -> str:
        """The kind of device that tensors of this rank live on; simulated CUDA has them on the CPU."""
        return torch.empty(0, device=self.strategy.device).device.type

    def where(self, moved: str) -> set[str]:
        """The kinds of devices that hold the ``"model"``, or the states of the ``"optimizer"``."""
        states = (value for state in self.optimizer.state.values() for value in state.values())
        held = self.strategy.unwrap_model(self.model).parameters() if moved == "model" else states
        return {one.device.type for one in held if isinstance(one, torch.Tensor) and one.dim() and one.numel()}


def _trains(make: Make, steps: int) -> dict[str, torch.Tensor]:
    run = Run(make)
    for number in range(steps):
        run.step(number)
    return run.weights


def _moves_optimizer(make: Make) -> tuple[dict[str, torch.Tensor], list[bool]]:
    run, places = Run(make), []
    for number in range(3):
        run.strategy.maybe_load_optimizer(run.optimizer)
        if number:
            places.append(run.where("optimizer") == {run.home})
        run.step(number)
        run.step(9, micro_batches=1)  # an offload ends the iteration, and this is dropped
        run.strategy.maybe_offload_optimizer(run.optimizer)
        places.append(run.where("optimizer") == {"cpu"})
    return run.weights, places


def _moves_model(make: Make) -> tuple[dict[str, torch.Tensor], list[bool]]:
    run, places = Run(make), []
    ids = workload.batch(0, 2).to(run.strategy.device)
    for number in range(3):
        run.step(number)
        before = run.weights
        with torch.no_grad():
            logits = run.model(ids).clone()
        run.step(9, micro_batches=1)
        run.strategy.offload_model(run.model)
        places.append(run.where("model") <= {"cpu"})  # where ranks share the weights, a rank may have none as a tensor
        run.strategy.reload_model(run.model)
        places.append(run.where("model") <= {run.home})
        workload.same(run.weights, before, what="moved out and back", within=0.0)
        with torch.no_grad():
            places.append(torch.equal(run.model(ids), logits))
    return run.weights, places


@contract.check(401, "moves_optimizer")
def check_an_offloaded_optimizer_changes_nothing(subject: Subject) -> None:
    """The states of the optimizer are on the CPU while they are out, and training with them moved in each iteration ends on the same weights, exactly; micro-batches without a step are dropped."""  # noqa: E501
    _same_as_without(subject, _moves_optimizer)


@contract.check(402, "moves_model")
def check_an_offloaded_model_changes_nothing(subject: Subject) -> None:
    """The weights are on the CPU while they are out, come back as they were, and training with them moved in each iteration ends on the same weights, exactly; micro-batches without a step are dropped."""  # noqa: E501
    _same_as_without(subject, _moves_model)


def _same_as_without(subject: Subject, program: Callable[[Make], Any]) -> None:
    for (found, places), expected in zip(subject.run(program), subject.run(_trains, 3), strict=True):
        if not all(places):
            raise AssertionError(f"what was moved is where it should be, and as it was, at each move: {places}")
        workload.same(found, expected, what="with moves", within=0.0)


def _twice_optimizer(make: Make) -> tuple[list[str], dict[str, torch.Tensor]]:
    run = Run(make)
    strategy, optimizer = run.strategy, run.optimizer
    run.step(0)
    strategy.maybe_load_optimizer(optimizer)  # nothing to load yet: an iteration may begin so
    strategy.maybe_offload_optimizer(optimizer)
    found = [refused(lambda: strategy.maybe_offload_optimizer(optimizer), OffloadStateError)]
    found.append(refused(lambda: run.step(1), OffloadStateError))
    strategy.maybe_load_optimizer(optimizer)
    found.append(refused(lambda: strategy.maybe_load_optimizer(optimizer), OffloadStateError))
    run.step(1)
    return found, run.weights


@contract.check(403, "moves_optimizer")
def check_optimizer_moves_come_in_pairs(subject: Subject) -> None:
    """The second offload, the second load and a step in between are errors that name both places, and change nothing (K26)."""  # noqa: E501
    _refuses(subject, _twice_optimizer, (2, 2, 2))


def _twice_model(make: Make) -> tuple[list[str], dict[str, torch.Tensor]]:
    run = Run(make)
    strategy, model = run.strategy, run.model
    run.step(0)
    found = [refused(lambda: strategy.reload_model(model), OffloadStateError)]
    strategy.offload_model(model)
    found.append(refused(lambda: strategy.offload_model(model), OffloadStateError))
    loss = torch.zeros((), requires_grad=True)
    found.append(refused(lambda: strategy.backward(loss, model, run.optimizer), OffloadStateError))
    found.append(refused(lambda: strategy.optimizer_step(run.optimizer, model), OffloadStateError))
    strategy.reload_model(model)
    run.step(1)
    return found, run.weights


@contract.check(404, "moves_model")
def check_model_moves_come_in_pairs(subject: Subject) -> None:
    """The second offload, a reload without one and training in between are errors that name the places, and change nothing (K26)."""  # noqa: E501
    _refuses(subject, _twice_model, (1, 2, 2, 2))


def _refuses(subject: Subject, program: Callable[[Make], Any], places: tuple[int, ...]) -> None:
    for (messages, weights), expected in zip(subject.run(program), subject.run(_trains, 2), strict=True):
        for message, least in zip(messages, places, strict=True):
            if message.count(".py:") < least:
                raise AssertionError(f"expected {least} places in {message!r}")
        workload.same(weights, expected, what="after moves that were refused", within=0.0)


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
