"""Training by reinforcement: prompts in, a better model out. Importing this package loads nothing else."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.trainer.ppo_trainer import SPMDPPOTrainer as SPMDPPOTrainer
    from lightrft.trainer.settings import TrainerConfig as TrainerConfig

__all__ = ["SPMDPPOTrainer", "TrainerConfig"]

_HOMES = {"SPMDPPOTrainer": "ppo_trainer", "TrainerConfig": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
