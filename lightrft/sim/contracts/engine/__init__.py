"""The contract of engines: what ``RolloutEngine`` promises a trainer, checked of any engine.

``Subject`` says how to start the engine and which models it has. ``docs/contracts.md`` shows how it is bound.
"""

from __future__ import annotations

from lightrft.sim.contracts.engine import completions, ending, sampling, seeds, sharing, states, updates
from lightrft.sim.contracts.engine.capabilities import CAPABILITIES, LACKS, contract
from lightrft.sim.contracts.engine.subject import Subject

__all__ = ["CAPABILITIES", "CHECKS", "LACKS", "Subject", "contract", "parametrize"]

TOPICS = (completions, sampling, seeds, states, updates, sharing, ending)
"""The modules that hold the checks, in the order of their numbers."""

CHECKS = contract.checks
parametrize = contract.parametrize
