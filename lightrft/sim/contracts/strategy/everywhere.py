"""ST701 and on: one run, every backend. Ten steps equal a plain process, however they are spread."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from lightrft.sim.contracts.strategy import sequences, workload
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.training import accumulating
from lightrft.sim.contracts.strategy.workload import Recipe, Told

if TYPE_CHECKING:
    from lightrft.sim.contracts.strategy.subject import Make, Subject

STEPS = 10
RECIPES = {
    "SGD": Recipe(optimizer="sgd", max_norm=0.0, steps=STEPS),
    "AdamW, clipped": Recipe(optimizer="adamw", max_norm=0.05, steps=STEPS),
}


def _runs(make: Make, several: list[tuple[Recipe, dict[str, Any]]]) -> list[Told]:
    return [workload.train(make(max_norm=recipe.max_norm, **settings), recipe) for recipe, settings in several]


@contract.check(701)
def check_ten_steps_equal_a_plain_process(subject: Subject) -> None:
    """With and without accumulation, under SGD without clipping and AdamW with it: weights within 5e-5, gradient norms within 1e-5 relative, losses within 1e-5 (F13)."""  # noqa: E501
    several = list(itertools.product(RECIPES.items(), (1, 4)))
    plan = [(recipe, accumulating(subject.size, times)) for (_, recipe), times in several]
    for found in subject.run(_runs, plan):
        for ((name, recipe), times), told in zip(several, found, strict=True):
            workload.close(told, workload.plain(recipe), what=f"{name}, {times} micro-batches a step")


def _sequence_runs(make: Make, several: list[tuple[Recipe, dict[str, Any]]]) -> list[Told]:
    return [sequences.train(make(max_norm=recipe.max_norm, **settings), recipe) for recipe, settings in several]


@contract.check(702, "sequence_parallel")
def check_ten_steps_with_shared_sequences(subject: Subject) -> None:
    """The same where two ranks share each sequence (F14)."""
    subject.needs(2)
    several = list(itertools.product(RECIPES.items(), (1, 4)))
    plan = [(recipe, accumulating(subject.size, times, sp_size=2)) for (_, recipe), times in several]
    for found in subject.run(_sequence_runs, plan):
        for ((name, recipe), times), told in zip(several, found, strict=True):
            workload.close(told, sequences.plain(recipe), what=f"{name}, {times} micro-batches a step, sp_size 2")
