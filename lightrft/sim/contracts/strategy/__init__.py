"""The contract of strategies: what ``StrategyBase`` promises, checked of any strategy on any world.

``Subject`` says how to make the strategy and how to run ranks. ``docs/contracts.md`` shows how it is bound.
"""

from __future__ import annotations

from lightrft.sim.contracts.strategy import (
    checkpoints,
    communication,
    engines,
    everywhere,
    memory,
    precision,
    preparing,
    sequences,
    training,
)
from lightrft.sim.contracts.strategy.capabilities import LACKS, SETTINGS, contract
from lightrft.sim.contracts.strategy.subject import Make, Subject

__all__ = ["CHECKS", "LACKS", "SETTINGS", "Make", "Subject", "contract", "parametrize"]

TOPICS = (training, precision, communication, checkpoints, memory, engines, preparing, everywhere, sequences)
"""The modules that hold the checks, in the order of their numbers."""

CHECKS = contract.checks
parametrize = contract.parametrize
