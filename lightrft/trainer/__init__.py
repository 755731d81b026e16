"""Training by reinforcement: prompts in, a better model out. Importing this package loads nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.lazy import lazily

if TYPE_CHECKING:
    from lightrft.trainer.ppo_trainer import SPMDPPOTrainer as SPMDPPOTrainer
    from lightrft.trainer.settings import TrainerConfig as TrainerConfig

__all__ = ["SPMDPPOTrainer", "TrainerConfig"]

__getattr__, __dir__ = lazily(
    __name__,
    {"SPMDPPOTrainer": ".ppo_trainer", "TrainerConfig": ".settings"},
)
