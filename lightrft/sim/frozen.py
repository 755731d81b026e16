"""What the garbage collector need not look through during a run, and how often it looks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["collecting_by_ranks", "freeze_for_good", "freeze_imports", "frozen_heap"]

_MOST_RANKS = 64


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Spare the garbage collector what was there before: a trace that grows makes it look through the heap often."""
    if gc.get_freeze_count():  # somebody else's: not ours to undo
        yield
        return
    gc.freeze()
    _frozen_here.append(True)
    try:
        yield
    finally:
        _frozen_here.clear()
        gc.unfreeze()


@contextmanager
def collecting_by_ranks(ranks: int) -> Iterator[None]:
    """Collect garbage as often as a process of one rank would, though this one makes the objects of all ``ranks``.

    What lives for a short time is mostly dead by then, and costs nothing. Of many ranks only the first 64 count, so
    that garbage does not pile up.
    """
    before = gc.get_threshold()
    gc.set_threshold(before[0] * min(ranks, _MOST_RANKS), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def freeze_for_good() -> None:
    """The same, for a process that does nothing but one run: nothing is looked through again at its end."""
    gc.freeze()
    _frozen_here.append(True)


def freeze_imports() -> None:
    """Spare the garbage collector what a rank has just imported: each rank may collect, and would look through it."""
    if _frozen_here:
        gc.freeze()


_frozen_here: list[bool] = []
