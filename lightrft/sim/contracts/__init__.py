"""Contracts: lists of checks that every implementation of an interface passes. ``docs/contracts.md`` shows how.

``contracts.process_group`` is the contract of process groups, ``contracts.strategy`` that of strategies,
``contracts.engine`` that of inference engines and ``contracts.weight_sync`` that of sending weights to them;
``Contract`` makes another one.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from lightrft.sim.contracts.contract import Check, Contract

if TYPE_CHECKING:
    from types import ModuleType

    from lightrft.sim.contracts import engine as engine
    from lightrft.sim.contracts import process_group as process_group
    from lightrft.sim.contracts import strategy as strategy
    from lightrft.sim.contracts import weight_sync as weight_sync

__all__ = ["Check", "Contract", "engine", "process_group", "strategy", "weight_sync"]

_CONTRACTS = ("engine", "process_group", "strategy", "weight_sync")


def __getattr__(name: str) -> ModuleType:
    if name in _CONTRACTS:  # they need torch, which the form of a contract does not
        return importlib.import_module(f"lightrft.sim.contracts.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
