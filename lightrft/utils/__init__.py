"""What trainers and scripts need beside the strategies. Importing this package loads nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.strategy.arguments import add_arguments as add_arguments
    from lightrft.trainer.arguments import add_trainer_arguments as add_trainer_arguments

__all__ = ["add_arguments", "add_trainer_arguments"]


def __getattr__(name: str) -> Any:
    if name == "add_arguments":
        from lightrft.strategy.arguments import add_arguments

        return add_arguments
    if name == "add_trainer_arguments":
        from lightrft.trainer.arguments import add_trainer_arguments

        return add_trainer_arguments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
