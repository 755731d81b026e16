"""What trainers and scripts need beside the strategies. Importing this package loads nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.lazy import lazily

if TYPE_CHECKING:
    from lightrft.strategy.arguments import add_arguments as add_arguments
    from lightrft.trainer.arguments import add_trainer_arguments as add_trainer_arguments

__all__ = ["add_arguments", "add_trainer_arguments"]


__getattr__, __dir__ = lazily(
    __name__,
    {
        "add_arguments": "..strategy.arguments",
        "add_trainer_arguments": "..trainer.arguments",
    },
)
