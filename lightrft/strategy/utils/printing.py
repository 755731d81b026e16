"""Printing from one rank."""

from __future__ import annotations

from typing import TextIO

__all__ = ["print_from_first"]


def print_from_first(rank: int, *values: object, sep: str = " ", end: str = "\n", file: TextIO | None = None) -> None:
    """``print`` on rank 0, at once and not when a buffer is full; nothing on other ranks."""
    if rank == 0:
        print(*values, sep=sep, end=end, file=file, flush=True)
