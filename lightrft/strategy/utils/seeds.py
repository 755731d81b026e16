"""Seeding the generators that a training run draws from."""

from __future__ import annotations

import random

import torch

__all__ = ["set_seed"]


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices) with ``seed``.

    Every rank gets the same seed, so that models built on each rank are the same. Data differ by rank through the
    sampler, not through the seed.
    """
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
