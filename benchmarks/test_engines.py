"""The fake engine: seconds of a rollout by hash, and of a token of the model."""

from __future__ import annotations

import pytest

from benchmarks.engines import FACES, SPREADS, generation, rollout, update


@pytest.mark.parametrize("engine", FACES)
def test_1024_prompts_by_hash(report, engine):
    report("1,024 prompts gathered, completed by hash, scattered", [run["seconds"] for run in rollout(engine)])


@pytest.mark.parametrize("whose", ["ours", "theirs"])
@pytest.mark.parametrize("spread", SPREADS)
def test_one_token(report, spread, whose):
    report(f"one token of a tiny model, {spread} lengths", [1 / run[whose] for run in generation(spread)])


@pytest.mark.parametrize("engine", FACES)
def test_an_update(report, engine):
    report("update, beside one copy of the weights", [run["ratio"] for run in update(engine)])
