"""Command lines that complain in one line."""

from __future__ import annotations

import argparse
import sys
from typing import Any

__all__ = ["FAILED", "INTERRUPTED", "MISUSED", "Done", "Parser", "UsageError", "complain"]

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
"""Exit statuses: the run found something wrong, the command line cannot work, Ctrl-C."""


class UsageError(Exception):
    """The command line cannot work; the message is one line that says what to do."""


class Done(Exception):  # noqa: N818 - no error: --help and --version have printed what was asked for
    """There is nothing to run."""


class Parser(argparse.ArgumentParser):
    """Raises instead of ending the process, and complains in one line."""

    def exit(self, status: int = 0, message: str | None = None) -> Any:  # noqa: ARG002 - argparse's signature
        """There is nothing left to do."""
        raise Done

    def error(self, message: str) -> Any:
        """The command line cannot work."""
        raise UsageError(f"{self.prog}: error: {message} (help: {self.prog} --help)")


def complain(text: str) -> None:
    """Say something on standard error, after all that was printed."""
    sys.stdout.flush()
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - it is what a command has to say
