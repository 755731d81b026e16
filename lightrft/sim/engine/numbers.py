"""Random numbers that depend on nothing but what they are asked for: counters, not states."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["U64", "digest", "mixed", "uniform"]

U64 = NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def mixed(keys: U64, counter: int | U64 = 0) -> U64:
    """A 64-bit number for each key and counter: SplitMix64 (Steele, Lea and Flood, 2014) at that place of its stream.

    Args:
        keys: any shape.
        counter: of that shape, or one for all.
    """
    with np.errstate(over="ignore"):
        state = keys + _GOLDEN * (np.asarray(counter, dtype=np.uint64) + np.uint64(1))
        state = (state ^ (state >> np.uint64(30))) * _FIRST
        state = (state ^ (state >> np.uint64(27))) * _SECOND
    found: U64 = state ^ (state >> np.uint64(31))
    return found


def uniform(numbers: U64) -> NDArray[np.float64]:
    """The same as numbers in [0, 1): their upper 53 bits."""
    found: NDArray[np.float64] = (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return found


def digest(parts: Iterable[object]) -> int:
    """64 bits that depend on the text of each of ``parts``."""
    text = "\x00".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
