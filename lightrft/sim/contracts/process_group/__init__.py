"""The contract of process groups: what ``torch.distributed`` promises, checked of any world that runs ranks.

``Subject`` says how to run a function on ranks and what the implementation lacks; ``LACKS`` holds what was measured or
documented of real and simulated backends.
"""

from __future__ import annotations

from lightrft.sim.contracts.process_group import (
    asynchronous,
    dtypes,
    functional,
    grouping,
    meshes,
    messages,
    mismatches,
    moving,
    objects,
    reducing,
    refusals,
)
from lightrft.sim.contracts.process_group.capabilities import LACKS, contract
from lightrft.sim.contracts.process_group.subject import Subject

__all__ = ["CHECKS", "LACKS", "Subject", "contract", "parametrize"]

TOPICS = (
    reducing,
    moving,
    objects,
    messages,
    asynchronous,
    functional,
    grouping,
    meshes,
    dtypes,
    refusals,
    mismatches,
)
"""The modules that hold the checks, in the order of their numbers."""

CHECKS = contract.checks
parametrize = contract.parametrize
