"""ST101 and on: gradients, optimizer steps, clipping and accumulation."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import torch

from lightrft.errors import ConfigError
from lightrft.sim.contracts.strategy import workload
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.subject import Make, Subject, refused
from lightrft.sim.contracts.strategy.workload import BATCH, Recipe, Told

SGD = Recipe()
CLIPPED = Recipe(optimizer="adamw", max_norm=0.05)
DECAYING = Recipe(decay=0.5)
UNREACHED = Recipe(max_norm=0.05, steps=1)
TWO = (Recipe(steps=2), Recipe(steps=2, seed=1))


def accumulating(size: int, times: int, sp_size: int = 1) -> dict[str, int]:
    """Settings with which a rank has ``times`` micro-batches in each step."""
    micro = BATCH * sp_size // (size * times)
    return {"train_batch_size": BATCH, "micro_train_batch_size": micro, "sp_size": sp_size}


def _train(make: Make, recipe: Recipe, settings: dict[str, Any]) -> Told:
    return workload.train(make(max_norm=recipe.max_norm, **settings), recipe)


def _agrees(subject: Subject, recipe: Recipe, settings: dict[str, Any]) -> None:
    for rank, told in enumerate(subject.run(_train, recipe, settings)):
        workload.close(told, workload.plain(recipe), what=f"rank {rank}")


@contract.check(101)
def check_a_step_is_that_of_one_big_batch(subject: Subject) -> None:
    """Ranks that train on parts of a batch end with the losses, norms and weights of one process with all of it (F13)."""  # noqa: E501
    _agrees(subject, SGD, accumulating(subject.size, 1))


@contract.check(102)
def check_accumulation_averages_micro_batches(subject: Subject) -> None:
    """Several micro-batches a step end as one big batch does (F13, K04)."""
    _agrees(subject, SGD, accumulating(subject.size, 4))


@contract.check(103)
def check_gradients_are_clipped_to_the_global_norm(subject: Subject) -> None:
    """Clipping is by the norm over all ranks and parameters, and the norm before it is told (K03)."""
    _agrees(subject, Recipe(max_norm=0.05), accumulating(subject.size, 2))


@contract.check(104)
def check_adamw_with_clipping(subject: Subject) -> None:
    """AdamW with weight decay and clipping ends as in one process (K03)."""
    _agrees(subject, CLIPPED, accumulating(subject.size, 1))


def _steps(make: Make) -> list[bool]:
    strategy = make(train_batch_size=4 * make.world_size, micro_train_batch_size=1)
    model = workload.transformer()
    model, optimizer, _ = strategy.prepare((model, SGD.make(model.parameters()), None))
    stepped = []
    for _ in range(2):
        for ids in workload.micro_batches(strategy, 0, 4 * strategy.world_size):
            strategy.backward(workload.loss_of(model(ids), ids), model, optimizer)
            stepped.append(strategy.optimizer_step(optimizer, model, None, name="actor") is not None)
    return stepped


@contract.check(105)
def check_the_optimizer_steps_after_its_last_micro_batch(subject: Subject) -> None:
    """`optimizer_step` returns a norm after every `accumulated_gradient`-th micro-batch, and None after the others."""
    for found in subject.run(_steps):
        if found != [False, False, False, True] * 2:
            raise AssertionError(f"stepped after these micro-batches: {found}")


def _partial(make: Make) -> tuple[int, list[str], Told]:
    settings = {"train_batch_size": BATCH, "micro_train_batch_size": BATCH // (4 * make.world_size), "max_norm": 0.0}
    strategy = make(**settings)
    model = workload.transformer()
    model, optimizer, _ = strategy.prepare((model, SGD.make(model.parameters()), None))
    ids = next(workload.micro_batches(strategy, 99))
    strategy.backward(workload.loss_of(model(ids), ids), model, optimizer)
    strategy.optimizer_step(optimizer, model, None)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        dropped = strategy.drop_partial_accumulation(model)
    losses, norms = [], []
    for step in range(2):
        total, norm = 0.0, None
        for ids in workload.micro_batches(strategy, step):
            loss = workload.loss_of(model(ids), ids)
            strategy.backward(loss, model, optimizer)
            norm = strategy.optimizer_step(optimizer, model, None)
            total += loss.item()
        losses.append(strategy.all_reduce(total / 4))
        norms.append(norm if norm is not None else math.nan)
    told = Told(losses=losses, norms=norms, weights=workload.weights(strategy, model))
    return dropped, [str(one.message) for one in seen if issubclass(one.category, UserWarning)], told


@contract.check(106)
def check_a_partial_accumulation_does_not_leak(subject: Subject) -> None:
    """Gradients of micro-batches without a step are dropped with a warning, and change nothing later (K04)."""
    for dropped, seen, told in subject.run(_partial):
        if dropped != 1 or not any("1 of 4 micro-batches" in message for message in seen):
            raise AssertionError(f"dropped {dropped} micro-batches, with the warnings {seen}")
        workload.close(told, workload.plain(Recipe(steps=2)), what="after dropping")


def _rates(make: Make, settings: dict[str, Any]) -> list[float]:
    strategy = make(max_norm=0.0, **settings)
    model = workload.transformer()
    optimizer = DECAYING.make(model.parameters())
    model, optimizer, scheduler = strategy.prepare((model, optimizer, DECAYING.schedule(optimizer)))
    rates = []
    for step in range(DECAYING.steps):
        _step(strategy, model, optimizer, scheduler, step)
        rates.append(optimizer.param_groups[0]["lr"])
    return rates


def _step(strategy: Any, model: Any, optimizer: Any, scheduler: Any = None, step: int = 0, factor: float = 1.0) -> Any:
    """Train on the batch of ``step``; the norm of the gradient."""
    norm = None
    for ids in workload.micro_batches(strategy, step):
        strategy.backward(workload.loss_of(model(ids), ids) * factor, model, optimizer)
        norm = strategy.optimizer_step(optimizer, model, scheduler)
    return norm


@contract.check(107)
def check_the_scheduler_steps_with_the_optimizer(subject: Subject) -> None:
    """Each optimizer step is one step of the scheduler, and the weights move by the learning rate that it sets (K17)."""  # noqa: E501
    settings = accumulating(subject.size, 2)
    for found in subject.run(_rates, settings):
        if found != [0.05, 0.025, 0.0125]:
            raise AssertionError(f"learning rates after each step: {found}")
    _agrees(subject, DECAYING, settings)


def _skipped(make: Make, settings: dict[str, Any]) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    strategy = make(max_norm=CLIPPED.max_norm, **settings)
    model = workload.transformer()
    optimizer = CLIPPED.make(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    model, optimizer, scheduler = strategy.prepare((model, optimizer, scheduler))
    poison = math.nan if strategy.get_rank() == strategy.world_size - 1 else 1.0
    rates, weights = [], []
    for factor in (poison, 1.0):
        norm = _step(strategy, model, optimizer, scheduler, factor=factor)
        rates += [optimizer.param_groups[0]["lr"], float(math.isfinite(norm))]
        weights.append(workload.weights(strategy, model))
    return rates, weights


@contract.check(108, "skips_nan")
def check_a_nan_on_one_rank_skips_the_step_on_all(subject: Subject) -> None:
    """A gradient that is not finite on one rank is a skipped step on every rank: scheduler, weights and the state of the optimizer stay as they were (K11, K17)."""  # noqa: E501
    before = {name: weight.detach() for name, weight in workload.transformer().named_parameters()}
    after = workload.plain(dataclasses.replace(CLIPPED, steps=1)).weights
    for rates, (skipped, stepped) in subject.run(_skipped, accumulating(subject.size, 1)):
        if rates != [0.01, 0.0, 0.005, 1.0]:
            raise AssertionError(f"learning rate, and whether the norm is finite, after each of two steps: {rates}")
        workload.same(skipped, before, what="after a step that is skipped", within=0.0)
        workload.same(stepped, after, what="after the step that follows")


def _unused(make: Make, settings: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    strategy = make(max_norm=UNREACHED.max_norm, **settings)
    model = _with_unused()
    model, optimizer, _ = strategy.prepare((model, UNREACHED.make(model.parameters()), None))
    return _step(strategy, model, optimizer), workload.weights(strategy, model)


def _with_unused() -> workload.Transformer:
    model = workload.transformer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model.unused = torch.nn.Linear(3, 3)
    return model


@contract.check(109)
def check_a_parameter_without_gradient_is_fine(subject: Subject) -> None:
    """A parameter that the loss does not reach takes no part in the norm, and SGD leaves it as it was; the others train as without it (K17)."""  # noqa: E501
    told = workload.plain(UNREACHED)
    kept = {name: weight.detach() for name, weight in _with_unused().named_parameters() if "unused" in name}
    for norm, weights in subject.run(_unused, accumulating(subject.size, 2)):
        if norm is None or not abs(norm - told.norms[0]) <= 1e-5 * told.norms[0]:
            raise AssertionError(f"the norm is {norm!r}, and {told.norms[0]!r} without the parameter")
        workload.same({name: weights[name] for name in kept}, kept, what="not reached", within=0.0)
        workload.same(weights, told.weights | kept, what="beside parameters that are not reached")


def _unprepared(make: Make) -> list[str]:
    strategy = make()
    model = workload.transformer()
    frozen = strategy.prepare_model(workload.transformer(1).requires_grad_(False))
    loss = torch.zeros((), requires_grad=True)
    return [
        refused(lambda: strategy.backward(loss, frozen, None), ConfigError),  # type: ignore[arg-type]
        refused(strategy.prepare, ConfigError),
        refused(lambda: strategy.prepare("model"), ConfigError),
        refused(lambda: strategy.prepare_model(model, shard_size=strategy.world_size + 1), ConfigError),
        refused(lambda: strategy.all_reduce(1.0, op="median"), ConfigError),
    ]


@contract.check(110)
def check_what_cannot_be_trained_is_refused(subject: Subject) -> None:
    """A frozen model in `backward`, nothing or no model in `prepare`, a shard size that does not fit, an unknown reduction: each is a ConfigError that says what is allowed (K08, K19)."""  # noqa: E501
    for found in subject.run(_unprepared):
        wanted = ("evaluation", "nothing", "str", f"{subject.size + 1}", "mean")
        for message, word in zip(found, wanted, strict=True):
            if word not in message:
                raise AssertionError(f"expected {word!r} in {message!r}")


@contract.check(111)
def check_tied_weights_stay_tied(subject: Subject) -> None:
    """An output layer that is the embedding stays so, and gets the gradient of both uses once (K18)."""
    recipe = Recipe(tied=True)
    for told in subject.run(_train, recipe, accumulating(subject.size, 2)):
        workload.close(told, workload.plain(recipe), what="tied weights")


def _alternating(make: Make) -> list[dict[str, torch.Tensor]]:
    strategy = make(max_norm=0.0, train_batch_size=BATCH, micro_train_batch_size=BATCH // (2 * make.world_size))
    pairs = []
    for recipe in TWO:
        model = recipe.model()
        pairs.append(strategy.prepare((model, recipe.make(model.parameters()), None))[:2])
    for step in range(TWO[0].steps):
        for ids in workload.micro_batches(strategy, step):
            for model, optimizer in pairs:
                strategy.backward(workload.loss_of(model(ids), ids), model, optimizer)
                strategy.optimizer_step(optimizer, model, None)
    return [workload.weights(strategy, model) for model, _ in pairs]


@contract.check(112)
def check_two_models_are_trained_in_turn(subject: Subject) -> None:
    """Actor and critic count their micro-batches each for itself, and each ends as if it were alone."""
    expected = [workload.plain(recipe).weights for recipe in TWO]
    for found in subject.run(_alternating):
        for weights, alone, which in zip(found, expected, ("first", "second"), strict=True):
            workload.same(weights, alone, what=f"the {which} of two models")


def _defaults(make: Make) -> tuple[float, list[float]]:
    strategy = make(actor_learning_rate=0.003, weight_decay=0.1)
    before, after = workload.transformer(), workload.transformer(1)
    optimizer = strategy.create_optimizer(before)
    model, optimizer, _ = strategy.prepare((before, optimizer, None))
    other = strategy.prepare(after)
    later = strategy.create_optimizer(other)
    ids = next(workload.micro_batches(strategy, 0, strategy.groups.dp_size))
    for one, stepping in ((model, optimizer), (other, later)):
        strategy.backward(workload.loss_of(one(ids), ids), one, stepping)
        strategy.optimizer_step(stepping, one, None)
    moved = float((workload.weights(strategy, other)["head.weight"] - workload.transformer(1).head.weight).abs().max())
    return moved, sorted({group["weight_decay"] for group in optimizer.param_groups})


@contract.check(115)
def check_an_optimizer_needs_no_arguments(subject: Subject) -> None:
    """`create_optimizer(model)` works before and after `prepare`, with the settings of the strategy (K30)."""
    for moved, decays in subject.run(_defaults):
        if not 0.002 < moved < 0.004 or decays != [0.0, 0.1]:
            raise AssertionError(f"the first step moved weights by {moved}, and the weight decays are {decays}")
