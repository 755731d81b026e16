"""EN301 and on: what a draw depends on, and what not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch

from lightrft.sim.contracts.engine.capabilities import contract
from lightrft.sim.contracts.findings import expect
from lightrft.strategy.utils.random_state import capture_random_state, restore_random_state
from lightrft.strategy.utils.seeds import set_seed

if TYPE_CHECKING:
    from lightrft.sim.contracts.engine.subject import Subject

__all__: list[str] = []


@contract.check(301, "seeds")
def check_a_seed_gives_the_same_completions(subject: Subject) -> None:
    """The same requests with the same seed have the same completions, with another seed others (F12)."""
    subject.fresh()
    first, again, other = (subject.samples(n=2, seed=seed) for seed in (5, 5, 6))
    expect(first == again, f"seed=5 gave {first}, and the second time {again}")
    expect(set(first).isdisjoint(other), f"seeds 5 and 6 both gave some of {other}")


@contract.check(302, "seeds")
def check_a_completion_does_not_depend_on_the_batch(subject: Subject) -> None:
    """With a seed, a completion is the same alone, among others and in another order (F12)."""
    subject.fresh()
    together = subject.samples(n=2, seed=5)
    for place, prompt in enumerate(subject.prompts):
        alone = subject.samples([prompt], n=2, seed=5)
        expected = together[2 * place : 2 * place + 2]
        expect(alone == expected, f"{prompt} was completed by {alone} alone, and by {expected} among others")
    backwards = subject.samples(subject.prompts[::-1], n=2, seed=5)
    expected = [one for place in range(len(subject.prompts) - 1, -1, -1) for one in together[2 * place : 2 * place + 2]]
    expect(backwards == expected, f"in another order {backwards}, expected {expected}")


@contract.check(303, "seeds")
def check_a_prompt_that_comes_twice_is_completed_twice(subject: Subject) -> None:
    """A prompt that is twice among the requests has two completions, the first of which is that of the prompt alone."""
    subject.fresh()
    first, second = subject.samples(subject.prompts[:1] * 2, seed=5)
    expect(first != second, f"both were completed by {first}")
    expect(subject.samples(subject.prompts[:1], seed=5) == [first], "alone it is completed by something else")


@contract.check(304)
def check_samples_of_a_prompt_differ(subject: Subject) -> None:
    """The samples of one prompt differ from each other."""
    subject.fresh()
    found = subject.samples(subject.prompts[:1], n=6, temperature=1.5)
    expect(len(set(found)) > 3, f"six samples are {found}")


@contract.check(305)
def check_without_a_seed_every_call_draws_anew(subject: Subject) -> None:
    """Where no seed is given, every call draws other tokens."""
    subject.fresh()
    first, second = (subject.samples(temperature=1.5) for _ in range(2))
    expect(first != second, f"two calls gave {first}")


@contract.check(306)
def check_where_nothing_is_drawn_nothing_changes(subject: Subject) -> None:
    """At temperature 0 a call gives the same as the one before, with any seed and without."""
    subject.fresh()
    found = [subject.generate(logprobs=0, seed=seed) for seed in (None, None, 7, 8)]
    tokens = [[one.output_token_ids for one in each] for each in found]
    expect(all(each == tokens[0] for each in tokens), f"seeds None, None, 7 and 8 gave {tokens}")


@contract.check(307)
def check_the_generators_of_the_process_are_left_alone(subject: Subject) -> None:
    """No call draws from the generators of torch, NumPy and Python, or seeds them."""
    engine = subject.fresh()
    calls = {
        "generate": lambda: subject.samples(n=2),
        "update_weights": lambda: subject.send(1),
        "sleep and wake_up": lambda: (engine.sleep(), engine.wake_up()),
        "reset_caches": engine.reset_caches,
    }
    for name, call in calls.items():
        expected = _numbers(lambda: None)
        expect(_numbers(call) == expected, f"{name} has drawn from the generators of the process, or seeded them")


def _numbers(call: Callable[[], object]) -> tuple[float, ...]:
    """Random numbers that come after ``call``; the generators are afterwards what they were."""
    before = capture_random_state()
    try:
        set_seed(1)
        call()
        return random.random(), float(np.random.rand()), torch.rand(1).item()  # noqa: NPY002 - that of the process
    finally:
        restore_random_state(before)
