"""Digests of images and videos, and their places in prompts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lightrft.sim.engine.numbers import digest

__all__ = ["expanded", "media_digest"]


def expanded(tokens: Sequence[int], medium: int, counts: Iterable[int]) -> tuple[int, ...]:
    """``tokens`` as the model sees them: each ``medium`` as often as the next of ``counts`` says."""
    remaining = iter(counts)
    return tuple(each for token in tokens for each in [token] * (next(remaining) if token == medium else 1))


def media_digest(given: Any) -> int:
    """64 bits that depend on the content: of an image of Pillow, an array, a tensor, a path, or a list of them."""
    if isinstance(given, (list, tuple)):
        return digest(media_digest(one) for one in given)
    if hasattr(given, "numpy") and hasattr(given, "detach"):
        given = given.detach().cpu().numpy()
    if hasattr(given, "tobytes"):
        shape = getattr(given, "shape", None) or (getattr(given, "size", None), getattr(given, "mode", None))
        return digest([shape, given.tobytes().hex()])
    return digest([given])
