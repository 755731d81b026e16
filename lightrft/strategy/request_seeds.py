"""A seed for each request, which follows from what the request is and not from the batch it is in."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from lightrft.strategy.requests import Request

__all__ = ["content_of", "derived_seed", "digest_of", "seeds_for"]


def content_of(request: Request) -> bytes:
    """A digest of everything in ``request``; equal requests have equal ones, also in another process.

    Raises:
        ConfigError: an image or a video is nothing that can be read: no array, no text and nothing that can be pickled.
    """
    digest = hashlib.blake2b(digest_size=16)
    if request.prompt_token_ids is not None:
        digest.update(b"tokens" + np.array(request.prompt_token_ids, dtype=np.int64).tobytes())
    else:
        digest.update(b"text" + str(request.prompt).encode())
    for kind, media in ((b"images", request.images), (b"videos", request.videos)):
        for one in media:
            digest.update(kind)
            _add(digest, one)
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


_PLAIN = (type(None), bool, int, float, str, bytes)


def _add(digest: Any, medium: Any) -> None:
    """Add a medium, or what it is made of. Each part tells its kind and its size, so that parts cannot run together."""
    if isinstance(medium, Mapping):
        entries = sorted(medium.items(), key=lambda entry: repr(entry[0]))
        _add_all(digest, "mapping", [part for entry in entries for part in entry])
    elif isinstance(medium, (list, tuple)):
        _add_all(digest, "sequence", medium)
    elif isinstance(medium, (set, frozenset)):
        _add_all(digest, "set", sorted(medium, key=repr))
    elif isinstance(medium, torch.Tensor):
        plain = medium.detach().cpu().contiguous()
        _add_bytes(digest, (plain.dtype, tuple(plain.shape)), plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(medium, np.ndarray) and medium.dtype.hasobject:
        _add_all(digest, f"objects {medium.shape}", medium.ravel().tolist())
    elif hasattr(medium, "tobytes"):  # an image of PIL, an array of NumPy
        palette = medium.getpalette() if getattr(medium, "mode", None) == "P" else None
        about = [getattr(medium, name, None) for name in ("mode", "size", "shape", "dtype")]
        _add_bytes(digest, (*map(str, about), palette), medium.tobytes())
    elif isinstance(medium, _PLAIN):
        _add_bytes(digest, type(medium).__name__, repr(medium).encode())
    elif hasattr(medium, "__qualname__"):  # a class or a function
        _add_bytes(digest, medium.__module__, medium.__qualname__.encode())
    else:
        _add_all(digest, "object", _reduced(medium))


def _add_all(digest: Any, kind: str, parts: Sequence[Any]) -> None:
    _add_bytes(digest, (kind, len(parts)), b"")
    for part in parts:
        _add(digest, part)


def _add_bytes(digest: Any, about: Any, content: bytes) -> None:
    digest.update(f"{about} {len(content)} ".encode() + content)


def _reduced(medium: Any) -> list[Any]:
    """What an object is made of, as it is pickled."""
    try:
        parts = medium.__reduce_ex__(4)
    except Exception as error:
        raise ConfigError(
            f"an image or a video is a {type(medium).__name__}, which cannot be pickled ({error}), nor told from "
            "another one: give images of PIL, arrays, tensors or paths"
        ) from error
    if isinstance(parts, str):
        return [parts]
    return [list(part) if isinstance(part, Iterator) else part for part in parts]
