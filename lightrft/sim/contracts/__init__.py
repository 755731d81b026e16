"""Contracts: lists of checks that every implementation of an interface passes. ``docs/contracts.md`` shows how.

``contracts.process_group`` is the contract of process groups, ``contracts.strategy`` that of strategies; ``Contract``
makes another one.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from lightrft.sim.contracts.contract import Check, Contract

if TYPE_CHECKING:
    from lightrft.sim.contracts import process_group as process_group
    from lightrft.sim.contracts import strategy as strategy

__all__ = ["Check", "Contract", "process_group", "strategy"]


def __getattr__(name: str) -> ModuleType:
    if name in ("process_group", "strategy"):  # they need torch, which the form of a contract does not
        return importlib.import_module(f"lightrft.sim.contracts.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
