"""ST301 and on: checkpoints, and going on from them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightrft.errors import CheckpointError, ConfigError
from lightrft.sim.contracts.strategy import workload
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.subject import Make, Subject, refused
from lightrft.sim.contracts.strategy.workload import BATCH, Recipe

RECIPE = Recipe(optimizer="adamw", max_norm=0.05)
STEPS = 4


class Run:
    """Training that can be left after any step and taken up again, with a scheduler and random noise in its loss.

    Args:
        make: makes its strategy.
        seed: of the weights, and of the random numbers of the rank: every rank draws its own.
    """

    def __init__(self, make: Make, seed: int = 0) -> None:
        micro = BATCH // (2 * make.world_size)
        self.strategy = make(max_norm=RECIPE.max_norm, train_batch_size=BATCH, micro_train_batch_size=micro)
        model = workload.transformer(seed)
        optimizer = RECIPE.make(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        self.model, self.optimizer, self.scheduler = self.strategy.prepare((model, optimizer, scheduler))
        self.noise: list[float] = []
        own = 1000 * seed + self.strategy.get_rank()
        torch.manual_seed(own)
        random.seed(own)
        np.random.seed(own)  # noqa: NPY002 - the generator that a process has is what is looked at

    def train(self, first: int, last: int) -> None:
        """Steps ``first`` to ``last``, without the last one."""
        for step in range(first, last):
            for ids in workload.micro_batches(self.strategy, step):
                drawn = [torch.rand(1).item(), random.random(), np.random.rand()]  # noqa: NPY002 - the same
                loss = workload.loss_of(self.model(ids), ids) * (1 + sum(drawn))
                self.strategy.backward(loss, self.model, self.optimizer)
                self.strategy.optimizer_step(self.optimizer, self.model, self.scheduler)
                self.noise += drawn

    @property
    def weights(self) -> dict[str, Tensor]:
        """Whole."""
        return workload.weights(self.strategy, self.model)


def _uninterrupted(make: Make) -> tuple[dict[str, Tensor], list[float]]:
    run = Run(make)
    run.train(0, STEPS)
    return run.weights, run.noise


def _stops(make: Make, folder: str, after: int) -> str:
    run = Run(make)
    run.train(0, after)
    return run.strategy.save_ckpt(run.model, folder, client_state={"consumed_samples": BATCH * after})


def _goes_on(make: Make, folder: str) -> tuple[dict[str, Tensor], list[float], dict[str, Any], float]:
    run = Run(make, seed=1)
    _, client = run.strategy.load_ckpt(run.model, folder)
    first = client["consumed_samples"] // BATCH
    run.train(first, STEPS)
    return run.weights, run.noise, client, run.optimizer.param_groups[0]["lr"]


@contract.check(301)
def check_resuming_equals_going_on(subject: Subject) -> None:
    """Stopped after any step and resumed, training ends as if it had gone on, bit for bit, with the random numbers of each rank (F18, K14)."""  # noqa: E501
    expected = subject.run(_uninterrupted)
    if len({noise[0] for _, noise in expected}) < subject.size:
        raise AssertionError("ranks that are seeded apart draw the same random numbers")
    for after in (1, 3):
        with subject.folder() as folder:
            subject.run(_stops, folder, after)
            resumed = subject.run(_goes_on, folder)
        for (weights, noise, client, rate), (whole, drawn) in zip(resumed, expected, strict=True):
            workload.same(weights, whole, what=f"resumed after step {after}", within=0.0)
            rest = drawn[len(drawn) * after // STEPS :]
            if noise != rest:
                raise AssertionError(f"random numbers {noise} after resuming, {rest} without")
            if client != {"consumed_samples": BATCH * after} or abs(rate - 0.01 * 0.9**STEPS) > 1e-12:
                raise AssertionError(f"client state {client}, learning rate {rate}")


def _at_another_size(make: Make, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = Run(make, seed=1)
    run.strategy.load_ckpt(run.model, folder)
    loaded = run.weights
    for step in range(2, STEPS):
        for ids in workload.micro_batches(run.strategy, step):
            run.strategy.backward(workload.loss_of(run.model(ids), ids), run.model, run.optimizer)
            run.strategy.optimizer_step(run.optimizer, run.model, run.scheduler)
    return loaded, run.weights


def _saves_for_others(make: Make, folder: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    run = Run(make)
    run.train(0, 2)
    run.strategy.save_ckpt(run.model, folder)
    saved = run.weights
    for step in range(2, STEPS):
        for ids in workload.micro_batches(run.strategy, step):
            run.strategy.backward(workload.loss_of(run.model(ids), ids), run.model, run.optimizer)
            run.strategy.optimizer_step(run.optimizer, run.model, run.scheduler)
    return saved, run.weights


@contract.check(302, "other_sizes")
def check_a_checkpoint_loads_at_other_sizes(subject: Subject) -> None:
    """Saved by this number of ranks, a checkpoint loads on 1, 2 and 4: the weights exactly, and training goes on alike (F19)."""  # noqa: E501
    with subject.folder() as folder:
        saved, ended = subject.run(_saves_for_others, folder)[0]
        for size in {1, 2, 4} - {subject.size}:
            for loaded, end in subject.run(_at_another_size, folder, size=size):
                workload.same(loaded, saved, what=f"loaded by {size} ranks", within=0.0)
                workload.same(end, ended, what=f"trained on by {size} ranks")


def _layout(make: Make, folder: str) -> list[Any]:
    run = Run(make)
    found: list[Any] = []
    for step in range(4):
        run.train(step, step + 1)
        path = run.strategy.save_ckpt(run.model, folder, max_num=2, save_latest=step != 3)
        found.append(Path(path).name)
    found.append(_tags(folder))
    found.append(Path(folder, "latest").read_text().strip())
    path = run.strategy.save_ckpt(run.model, folder, "best", max_num=10)
    found.append(Path(path).name)
    found.append(Path(run.strategy.load_ckpt(run.model, folder, "best")[0]).name)
    return found


@contract.check(303)
def check_checkpoints_are_named_and_rotated(subject: Subject) -> None:
    """Tags, `latest`, `max_num` and `save_latest` do what they say, and the third argument is the tag (K13, K15)."""
    names = [f"global_step{step}" for step in (1, 2, 3, 4)]
    expected = [*names, names[2:], names[2], "best", "best"]
    with subject.folder() as folder:
        for found in subject.run(_layout, folder):
            if found != expected:
                raise AssertionError(f"expected {expected}, got {found}")


def _missing(make: Make, folder: str) -> list[str]:
    run = Run(make)
    found = [refused(lambda: run.strategy.load_ckpt(run.model, f"{folder}/nothing"), CheckpointError)]
    run.strategy.save_ckpt(run.model, folder, "one")
    found.append(refused(lambda: run.strategy.load_ckpt(run.model, folder, "two"), CheckpointError))
    found.append(refused(lambda: run.strategy.save_ckpt(run.model, folder, "../up"), ConfigError))
    return found


@contract.check(304)
def check_a_missing_checkpoint_is_named(subject: Subject) -> None:
    """A folder or tag that is not there is an error that says what is, and a tag that leads elsewhere is refused (K13)."""  # noqa: E501
    with subject.folder() as folder:
        for found in subject.run(_missing, folder):
            for message, word in zip(found, ("nothing", "one", "../up"), strict=True):
                if word not in message:
                    raise AssertionError(f"expected {word!r} in {message!r}")


def _chooses(make: Make, folder: str) -> list[Any]:
    run = Run(make)
    run.train(0, 2)
    run.strategy.save_ckpt(run.model, folder, client_state={"step": 2})
    expected = run.weights
    kept, results = run.optimizer.param_groups[0]["lr"], []
    choices: tuple[dict[str, Any], ...] = (
        {"load_module_only": True},
        {"load_lr_scheduler_states": False, "load_optimizer_states": False},
    )
    for options in choices:
        other = Run(make, seed=1)
        _, client = other.strategy.load_ckpt(other.model, folder, **options)
        workload.same(other.weights, expected, what=str(options), within=0.0)
        results += [client, other.optimizer.param_groups[0]["lr"] != kept]
        other.train(0, 1)  # the weights that were loaded, not older ones, are what the next step starts from
        results.append(max(float((other.weights[name] - expected[name]).abs().max()) for name in expected) < 0.1)
    return results


@contract.check(305)
def check_parts_of_a_checkpoint_can_be_left_out(subject: Subject) -> None:
    """Model only, or without optimizer and scheduler: the rest is as new, and the next step starts from what was loaded (K15)."""  # noqa: E501
    with subject.folder() as folder:
        for found in subject.run(_chooses, folder):
            if found != [{}, True, True, {"step": 2}, True, True]:
                raise AssertionError(f"client state, fresh scheduler, step from the loaded weights: {found}")


def _other_model(make: Make, folder: str) -> str:
    run = Run(make)
    run.strategy.save_ckpt(run.model, folder)
    strategy = make()
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    other, _, _ = strategy.prepare((other, RECIPE.make(other.parameters()), None))
    return refused(lambda: strategy.load_ckpt(other, folder, load_lr_scheduler_states=False), CheckpointError)


@contract.check(306)
def check_a_checkpoint_of_another_model_is_refused(subject: Subject) -> None:
    """A checkpoint whose parameters are not those of the model is an error that names some (K15)."""
    with subject.folder() as folder:
        for message in subject.run(_other_model, folder):
            if "weight" not in message:
                raise AssertionError(f"expected names of parameters in {message!r}")


def _saved_model(make: Make, folder: str, tied: bool) -> None:
    strategy = make()
    model = workload.transformer(tied=tied)
    model, _, _ = strategy.prepare((model, RECIPE.make(model.parameters()), None))
    strategy.save_model(model, None, folder)


@contract.check(307)
def check_a_saved_model_has_all_weights(subject: Subject) -> None:
    """`save_model` writes the weights of the model under their own names, once where they are tied (K18)."""
    from safetensors.torch import load_file

    for tied in (False, True):
        with subject.folder() as folder:
            subject.run(_saved_model, folder, tied)
            found: dict[str, Tensor] = {}
            for file in Path(folder).glob("*.safetensors"):
                found |= load_file(file)
        expected = {name: weight.detach() for name, weight in workload.transformer(tied=tied).named_parameters()}
        workload.same(found, expected, what=f"saved, tied={tied}", within=0.0)


def _limited(make: Make, folder: str) -> list[list[str]]:
    run = Run(make)
    run.train(0, 1)
    run.strategy.save_ckpt(run.model, folder, "0")
    size = sum(file.stat().st_size for file in Path(folder, "0").rglob("*") if file.is_file()) / 1e9
    found = []
    for tag, fitting in enumerate((2.5, 2.5, 1.5, 0.5), start=1):
        run.strategy.save_ckpt(run.model, folder, str(tag), max_num=9, max_mem=fitting * size)
        found.append(_tags(folder))
    return found


def _tags(folder: str) -> list[str]:
    return sorted(one.name for one in Path(folder).iterdir() if one.is_dir() and not one.name.startswith("."))


@contract.check(308)
def check_checkpoints_fit_into_max_mem(subject: Subject) -> None:
    """The oldest checkpoints go until all of them have no more than `max_mem` GB; the new one stays (K13)."""
    expected = [["0", "1"], ["1", "2"], ["3"], ["4"]]
    with subject.folder() as folder:
        for found in subject.run(_limited, folder):
            if found != expected:
                raise AssertionError(f"room for 2, 2, 1 and no checkpoint leaves {found}, expected {expected}")
