"""Weights of the actor into the engine: gathered one by one, sent in buckets, counted and checked."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightrft.errors import ConfigError, WeightSyncError
from lightrft.strategy.utils.fingerprints import fingerprint

if TYPE_CHECKING:
    from lightrft.strategy.engine import RolloutEngine

__all__ = ["Sent", "check_trained", "in_buckets", "poisons", "send"]

Named = tuple[str, Tensor]

_POISON = "LIGHTRFT_POISON_BUCKETS"
"""Set by the simulator, so that an engine that reads what it was sent after an update is found out."""


@dataclass(kw_only=True)
class Sent:
    """What was sent in one update.

    Attributes:
        version: that the engine has now.
        names: of the parameters, in order.
        bytes: of all of them, as they travelled.
        buckets: how many they travelled in.
        digests: fingerprints of what arrived, by name; ``None`` if it was not verified.
    """

    version: int
    names: list[str] = field(default_factory=list)
    bytes: int = 0
    buckets: int = 0
    digests: dict[str, str] | None = None


def poisons() -> bool:
    """Whether the environment says that what was sent is to be poisoned after an update."""
    return os.environ.get(_POISON) == "1"


def in_buckets(
    parameters: Iterable[Named], limit: int, *, dtype: torch.dtype | None = None, copies: list[Tensor] | None = None
) -> Iterator[list[Named]]:
    """Parameters in buckets of at most ``limit`` bytes, one after the other; a larger one has a bucket to itself.

    Nothing is copied that is not rounded. A bucket is forgotten when the next is asked for: if its reader keeps no
    tensors, no more than one bucket, and the tensor after it, exist at a time.

    Args:
        parameters: names and whole tensors, each good for as long as it is kept.
        limit: bytes of a bucket.
        dtype: to which wider floating-point tensors are rounded. Those of one dimension, which take little room, are
            left as they are: engines keep some of them, such as the biases of routers, in full precision.
        copies: send copies, and put them into this list too, so that they can be poisoned.

    Raises:
        ConfigError: ``limit`` is below 1.
    """
    if limit < 1:
        raise ConfigError(f"a bucket of {limit} bytes: expected 1 at least")
    bucket: list[Named] = []
    used = 0
    for name, tensor in parameters:
        wanted = _travelling(tensor, dtype)
        size = tensor.numel() * wanted.itemsize
        if bucket and used + size > limit:
            yield bucket
            bucket.clear()
            used = 0
        bucket.append((name, tensor.detach().to(wanted, copy=copies is not None)))
        if copies is not None:
            copies.append(bucket[-1][1])
        used += size
    if bucket:
        yield bucket
        bucket.clear()


def _travelling(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """In which dtype a tensor travels to an engine whose weights have ``dtype``."""
    rounds = dtype is not None and tensor.is_floating_point() and tensor.dim() > 1
    return dtype if dtype is not None and rounds and dtype.itemsize < tensor.itemsize else tensor.dtype


def _poison(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.view(-1).view(torch.uint8).fill_(255)


def send(
    engine: RolloutEngine,
    parameters: Iterable[Named],
    *,
    bucket_bytes: int,
    dtype: torch.dtype | None = None,
    verify: bool = False,
    poison: bool | None = None,
) -> Sent:
    """Replace the weights of ``engine``. *Collective*.

    Args:
        engine: with its weights awake.
        parameters: all of them: names of a checkpoint, whole tensors.
        bucket_bytes: see ``in_buckets``.
        dtype: of the engine's weights, see ``in_buckets``; parameters travel as they are if ``None``.
        verify: compare what the engine holds afterwards with what was sent, bit by bit.
        poison: send copies, and fill them with 0xFF bytes (NaN as floating point) when the engine says that it has
            them, so that one which is not done reads no plausible numbers; if ``None``, as the environment says.

    Raises:
        ConfigError: the engine cannot tell what it holds, which ``verify`` needs.
        WeightSyncError: names are missing, unexpected or come twice, or the engine did not read them all, or it holds
            something else: it is stale then.
    """
    if verify and not engine.tells_weights:
        raise _untold(engine)
    sent = Sent(version=engine.weight_version + 1, digests={} if verify else None)
    copies: list[Tensor] | None = [] if (poisons() if poison is None else poison) else None
    noted = _noted(sent, parameters, dtype, engine.weights_dtype)
    buckets = _counted(sent, in_buckets(noted, bucket_bytes, dtype=dtype, copies=copies))
    try:
        engine.update_weights(buckets, sent.version)
        unread = next(buckets, None)
    except BaseException:
        with suppress(Exception):  # of the source, which may fail too: the first error is told
            _gather_rest(buckets)
        raise
    _gather_rest(buckets)
    _poison(copies or ())
    if unread is not None:
        raise WeightSyncError(
            f"the engine stopped reading after bucket {sent.buckets - 1}: it holds a part of the weights"
        )
    engine.reset_caches()
    if sent.digests is not None:
        held = engine.fingerprints()
        if held is None:
            raise _untold(engine)
        _compare(engine, sent.digests, held)
    return sent


def _gather_rest(buckets: Iterator[list[Named]]) -> None:
    """Gathering is collective: a rank whose engine fails goes through all of it nevertheless."""
    for _ in buckets:
        pass


def _untold(engine: RolloutEngine) -> ConfigError:
    return ConfigError(f"{type(engine).__name__} cannot tell which weights it holds: leave verify=True out")


def _noted(
    sent: Sent,
    parameters: Iterable[Named],
    dtype: torch.dtype | None,
    held: torch.dtype | None,
) -> Iterator[Named]:
    """``parameters``, written down in ``sent``, with their digests if they are wanted.

    Digests are of what the engine tells: rounded as they travel to weights of ``dtype``, and then to ``held``.
    """
    seen: set[str] = set()
    for name, tensor in parameters:
        if name in seen:
            raise WeightSyncError(f"{name} was sent twice: names of the trainer are mapped to the same one")
        seen.add(name)
        sent.names.append(name)
        sent.bytes += tensor.numel() * _travelling(tensor, dtype).itemsize
        if sent.digests is not None:
            arrived = tensor.to(_travelling(tensor, dtype))
            sent.digests[name] = fingerprint(arrived.to(held) if held and arrived.is_floating_point() else arrived)
            del arrived
        yield name, tensor


def _counted(sent: Sent, buckets: Iterable[list[Named]]) -> Iterator[list[Named]]:
    for bucket in buckets:
        sent.buckets += 1
        yield bucket


def _compare(engine: RolloutEngine, sent: Mapping[str, str], held: Mapping[str, str]) -> None:
    other = [name for name, digest in sent.items() if held.get(name) != digest]
    if other:
        engine.spoil("holds other weights than were sent, as an update with verify=True has found")
        raise WeightSyncError(f"the engine holds other weights than were sent: {_some(other)}")


def check_trained(before: Mapping[str, str], now: Mapping[str, str], trained: Sequence[str]) -> None:
    """Training has changed something.

    Args:
        before: digests of the weights of a former update.
        now: of the present one.
        trained: names of parameters that were trained in between, and are sent.

    Raises:
        WeightSyncError: it has changed nothing.
    """
    if trained and before == now:
        raise WeightSyncError(
            f"no weight has changed by the optimizer steps since the last verified update: {_some(trained)}. The "
            "optimizer may have been made of other parameters than those of this model (of a copy, or of the model "
            "before it was wrapped), or the learning rate is too small for all weights in their dtype"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
