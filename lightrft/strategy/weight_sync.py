"""Weights of the actor into the engine: gathered one by one, sent in buckets, counted and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightrft.errors import ConfigError, WeightSyncError

if TYPE_CHECKING:
    from lightrft.strategy.engine import RolloutEngine

__all__ = ["Sent", "in_buckets", "send"]

Named = tuple[str, Tensor]

_ALIGNMENT = 16
"""Bytes: every dtype may begin there."""


@dataclass(kw_only=True)
class Sent:
    """What was sent in one update.

    Attributes:
        version: that the engine has now.
        names: of the parameters, in order.
        bytes: of all of them.
        buckets: how many they travelled in.
    """

    version: int
    names: list[str] = field(default_factory=list)
    bytes: int = 0
    buckets: int = 0


def in_buckets(
    parameters: Iterable[Named], limit: int, *, dtype: torch.dtype | None = None, poison: bool = False
) -> Iterator[list[Named]]:
    """Copy ``parameters`` into buckets, one after the other.

    All buckets use the same memory: the tensors of one are good until the next is asked for. So no more than one
    bucket, and the one tensor that is being copied into it, exist at a time. A tensor larger than ``limit`` has a
    bucket to itself, of its size.

    Args:
        parameters: names and whole tensors; each may be freed as soon as the next is asked for.
        limit: bytes of a bucket.
        dtype: of floating-point tensors in the buckets; as they are if ``None``.
        poison: fill a bucket with 0xFF bytes (NaN as floating point) once it has been used, so that a reader who is
            not done reads no plausible numbers.

    Raises:
        ConfigError: ``limit`` is below 1.
    """
    if limit < 1:
        raise ConfigError(f"a bucket of {limit} bytes: expected 1 at least")
    memory = torch.empty(0, dtype=torch.uint8)
    bucket: list[Named] = []
    used = 0
    for name, tensor in parameters:
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        size = tensor.numel() * wanted.itemsize
        if bucket and used + size > limit:
            yield bucket
            bucket, used = [], 0
            if poison:
                memory.fill_(255)
        if memory.numel() < used + size or memory.device != tensor.device:
            memory = torch.empty(max(limit, size), dtype=torch.uint8, device=tensor.device)
        view = memory[used : used + size].view(wanted).view(tensor.shape)
        view.copy_(tensor.detach())
        bucket.append((name, view))
        used = -(-(used + size) // _ALIGNMENT) * _ALIGNMENT
    if bucket:
        yield bucket
        if poison:
            memory.fill_(255)


def send(
    engine: RolloutEngine,
    parameters: Iterable[Named],
    *,
    bucket_bytes: int,
    dtype: torch.dtype | None = None,
    rename: Callable[[str], str] = str,
    expected: Sequence[str] | None = None,
    poison: bool = False,
) -> Sent:
    """Replace the weights of ``engine``. *Collective*.

    Args:
        engine: awake, or at least its weights.
        parameters: all of them: names of the trainer, whole tensors.
        bucket_bytes: see ``in_buckets``.
        dtype: of the engine's weights.
        rename: from the trainer's name to that of a checkpoint.
        expected: names of a checkpoint that the engine needs; not checked if ``None``.
        poison: see ``in_buckets``.

    Raises:
        WeightSyncError: names are missing, unexpected or come twice, or the engine did not read them all; nothing tells
            then what it holds.
    """
    sent = Sent(version=engine.weight_version + 1)

    def named() -> Iterator[Named]:
        for name, tensor in parameters:
            new = rename(name)
            sent.names.append(new)
            sent.bytes += tensor.numel() * tensor.element_size()
            yield new, tensor

    def counted() -> Iterator[list[Named]]:
        for bucket in in_buckets(named(), bucket_bytes, dtype=dtype, poison=poison):
            sent.buckets += 1
            yield bucket

    buckets = counted()
    try:
        engine.update_weights(buckets, sent.version)
        unread = next(buckets, None)
    finally:
        for _ in buckets:  # gathering is collective: a rank whose engine fails goes through all of it nevertheless
            pass
    if unread is not None:
        raise WeightSyncError(
            f"the engine stopped reading after bucket {sent.buckets - 1}: it holds a part of the weights"
        )
    _check_coverage(sent.names, expected)
    engine.reset_caches()
    return sent


def _check_coverage(names: Sequence[str], expected: Sequence[str] | None) -> None:
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) != len(names) else []
    missing = sorted(set(expected or ()) - set(names))
    unexpected = sorted(set(names) - set(expected)) if expected is not None else []
    problems = [
        f"{kind}: {', '.join(found[:5])}" + (f" and {len(found) - 5} more" if len(found) > 5 else "")
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("sent twice", twice))
        if found
    ]
    if problems:
        raise WeightSyncError(
            f"the weights that were sent are not those of the engine: {'; '.join(problems)}. Check that actor and "
            "engine are of the same model, and how names are mapped"
        )


def fingerprint(parameters: Iterable[Named]) -> dict[str, str]:
    """A short digest of each tensor's bytes, by name: equal if and (almost surely) only if the bytes are."""
    return {
        name: hashlib.blake2b(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(), digest_size=8
        ).hexdigest()
        for name, tensor in parameters
    }
