"""EN701 and on: the end of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.errors import EngineStateError
from lightrft.sim.contracts.engine.capabilities import contract
from lightrft.sim.contracts.engine.states import MOVES
from lightrft.sim.contracts.findings import expect, refused
from lightrft.strategy.engine import EngineStatus, is_engine

if TYPE_CHECKING:
    from lightrft.sim.contracts.engine.subject import Subject

__all__: list[str] = []


@contract.check(701)
def check_an_engine_that_was_shut_down_is_dead(subject: Subject) -> None:
    """After `shutdown`, in whatever state, an engine is dead: a second one does nothing, every other call is an EngineStateError that says what to do, and a new engine can be started (F17)."""  # noqa: E501
    engine = subject.fresh()
    engine.sleep(2)
    engine.shutdown()
    engine.shutdown()
    for name, move in MOVES.items():
        message = refused(lambda move=move: move(subject, engine), EngineStateError)  # type: ignore[misc]
        expect("setup_inference_engine" in message, f"{name} was refused without saying what to do: {message}")
    expect(engine.status is EngineStatus.DEAD, f"it is {engine.status}")
    subject.fresh()
    subject.holds(0, "started after another one has ended")


@contract.check(702)
def check_it_is_known_as_an_engine(subject: Subject) -> None:
    """`is_engine` knows it, and it says whether all ranks of a group call it."""
    engine = subject.fresh()
    expect(is_engine(engine), f"a {type(engine).__name__} is no engine for is_engine")
    expect(isinstance(engine.runs_on_all_ranks, bool), f"runs_on_all_ranks is {engine.runs_on_all_ranks!r}")
