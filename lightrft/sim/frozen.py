"""What the garbage collector need not look through during a run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["freeze_for_good", "freeze_imports", "frozen_heap"]


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


def freeze_for_good() -> None:
    """The same, for a process that does nothing but one run: nothing is looked through again at its end."""
    gc.freeze()
    _frozen_here.append(True)


def freeze_imports() -> None:
    """Spare the garbage collector what a rank has just imported: each rank may collect, and would look through it."""
    if _frozen_here:
        gc.freeze()


_frozen_here: list[bool] = []
