"""What the trainer adds to generation and training in one iteration."""

from __future__ import annotations

import functools

from benchmarks.groups import in_fresh_process
from benchmarks.quiet import quietest


@functools.cache
def iteration() -> dict[str, float]:
    """See ``iterations_child.iteration``; once, for it takes most of a minute."""
    (found,) = quietest(lambda: in_fresh_process("iterations_child"), 1)
    return found
