"""Short digests of tensors, fast enough to be taken of every weight at every update."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["fingerprint"]

_LANES = 1 << 15
_FACTOR = 0x5851F42D4C957F2D
"""Odd, so that multiplying by it loses nothing: the multiplier of a widely used generator of random numbers."""


def fingerprint(tensor: torch.Tensor) -> str:
    """16 hexadecimal digits that depend on every bit of ``tensor`` and on its place, and on dtype and shape.

    The 64-bit words are the coefficients of a polynomial modulo 2**64 in each of some lanes (Horner's rule, as in a
    Rabin-Karp hash); the lanes are hashed. It reads the tensor once. It detects accidents, not forgers.
    """
    plain = tensor.detach().cpu().contiguous()
    words, rest = _words(plain)
    digest = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)}".encode(), digest_size=8)
    whole = words.numel() // _LANES * _LANES
    if whole:
        lanes = words[:_LANES].clone()
        for first in range(_LANES, whole, _LANES):
            lanes.mul_(_FACTOR).add_(words[first : first + _LANES])
        digest.update(lanes.numpy().tobytes())
    digest.update(words[whole:].numpy().tobytes())
    digest.update(rest.numpy().tobytes())
    return digest.hexdigest()


def _words(plain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of a contiguous tensor: as 64-bit words, and those that are left over."""
    octets = plain.reshape(-1).view(torch.uint8)
    whole = octets.numel() // 8 * 8
    if octets.storage_offset() % 8:
        octets = octets.clone()
    return octets[:whole].view(torch.int64), octets[whole:]
