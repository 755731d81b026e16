"""The flags of the trainer."""

from __future__ import annotations

import argparse

from lightrft.strategy.arguments import add_settings
from lightrft.trainer.settings import TrainerConfig

__all__ = ["add_trainer_arguments"]


def add_trainer_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add a flag for every setting of the trainer, in groups, and return ``parser``; beside ``add_arguments``.

    ``TrainerConfig.from_args`` reads what the parser returns.

    Raises:
        ConfigError: if ``parser`` is no parser, or has one of the flags already; it is left as it was.
    """
    return add_settings(parser, TrainerConfig, "add_trainer_arguments")
