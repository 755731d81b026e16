"""Digests of images and videos, which is all that the fake engine sees of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightrft.sim.engine.numbers import digest

__all__ = ["expanded", "media_digest"]

_TOKENS = 4
"""That an image or a video takes."""


def expanded(tokens: Sequence[int], medium: int) -> tuple[int, ...]:
    """``tokens`` as the model sees them: each ``medium`` several times."""
    return tuple(each for token in tokens for each in [token] * (_TOKENS if token == medium else 1))


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
