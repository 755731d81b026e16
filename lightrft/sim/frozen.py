"""What the garbage collector need not look through during a run."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["freeze_for_good", "freeze_imports", "frozen_heap"]


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Spare the garbage collector what was there before: a trace that grows makes it look through the heap often."""
    if _frozen_by_others():
        yield
        return
    gc.freeze()
    _frozen_here.append(True)
    try:
        yield
    finally:
        _frozen_here.clear()
        gc.unfreeze()


def _frozen_by_others() -> bool:
    """Whether objects were frozen before: not ours to undo. They are counted one by one, and so until there are any."""
    if not _others and gc.get_freeze_count():
        _others.append(True)
    return bool(_others)


def freeze_for_good() -> None:
    """The same, for a process that does nothing but one run: nothing is looked through again at its end."""
    gc.freeze()
    _frozen_here.append(True)


def freeze_imports() -> None:
    """Spare the garbage collector what a rank has just imported: each rank may collect, and would look through it."""
    if _frozen_here:
        gc.freeze()


_frozen_here: list[bool] = []
_others: list[bool] = []
