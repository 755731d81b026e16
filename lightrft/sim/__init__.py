"""Simulated ranks: run unmodified ``torch.distributed`` code on N ranks in one process, and see every disagreement.

``SimWorld(8).run(fn)`` runs a function, ``lightrft sim -n 8 script.py`` a script, ``@pytest.mark.sim(ranks=8)`` a test.
``ProcessWorld(4).run(fn)`` runs the same function on real processes. ``contracts`` are lists of checks that every
implementation of an interface passes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.sim import contracts as contracts
    from lightrft.sim.process_world import ProcessWorld as ProcessWorld
    from lightrft.sim.world import SimWorld as SimWorld

__all__ = ["ProcessWorld", "SimWorld", "contracts"]


def __getattr__(name: str) -> Any:
    if name == "SimWorld":
        from lightrft.sim.world import SimWorld

        return SimWorld
    if name == "ProcessWorld":
        from lightrft.sim.process_world import ProcessWorld

        return ProcessWorld
    if name == "contracts":
        return importlib.import_module("lightrft.sim.contracts")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
