"""A seed for each request, which follows from what the request is and not from the batch it is in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from lightrft.strategy.requests import Request

__all__ = ["content_of", "derived_seed", "digest_of", "seeds_for"]


def content_of(request: Request) -> bytes:
    """A digest of everything in ``request``; equal requests have equal ones, also in another process."""
    digest = hashlib.blake2b(digest_size=16)
    if request.prompt_token_ids is not None:
        digest.update(b"tokens" + np.array(request.prompt_token_ids, dtype=np.int64).tobytes())
    else:
        digest.update(b"text" + str(request.prompt).encode())
    for kind, media in ((b"images", request.images), (b"videos", request.videos)):
        for one in media:
            digest.update(kind)
            _add_medium(digest, one)
    return digest.digest()


def digest_of(contents: Sequence[bytes]) -> str:
    """A digest of several requests in their order, of what :func:`content_of` gives for each."""
    return hashlib.blake2b(b"".join(contents), digest_size=8).hexdigest()


def derived_seed(*parts: Any) -> int:
    """A number of 0 to 2**62 - 1 that follows from ``parts``: numbers, texts and bytes."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def seeds_for(contents: Sequence[bytes], seed: int) -> list[int]:
    """Seeds of requests, each from ``seed``, the content of the request and how many like it came before.

    So a completion is the same whatever else is in the batch, and a prompt that is given twice has two completions.
    The samples of one request need seeds of their own: add their index.

    Args:
        contents: what :func:`content_of` gives.
        seed: of the call.
    """
    before: Counter[bytes] = Counter()
    seeds = []
    for content in contents:
        seeds.append(derived_seed(seed, content, before[content]))
        before[content] += 1
    return seeds


def _add_medium(digest: Any, medium: Any) -> None:
    if isinstance(medium, (list, tuple)):
        for one in medium:
            _add_medium(digest, one)
    elif isinstance(medium, torch.Tensor):
        plain = medium.detach().cpu().contiguous()
        digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif hasattr(medium, "tobytes"):  # an image of PIL, an array of NumPy
        about = (getattr(medium, "mode", None), getattr(medium, "size", None), getattr(medium, "shape", None))
        digest.update(repr(about).encode() + medium.tobytes())
    else:
        digest.update(repr(medium).encode())
