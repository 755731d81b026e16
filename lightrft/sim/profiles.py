"""What each backend accepts.

``strict`` refuses whatever any real backend refuses or corrupts; where only one backend offers an operation at all, the
backend the group was made with decides. ``gloo`` and ``nccl`` behave as that backend, whatever the group is called.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightrft.errors import ConfigError

__all__ = ["PROFILES", "Profile", "profile_for"]

_GLOO_DTYPES = frozenset(
    {
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
    }
)
_NCCL_DTYPES = frozenset(
    {
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
    }
)
_BITWISE = frozenset({"BAND", "BOR", "BXOR"})


@dataclass(frozen=True, slots=True)
class Profile:
    """The rules of one backend.

    Attributes:
        name: ``strict``, ``gloo`` or ``nccl``.
        dtypes: dtypes that a collective accepts; None for all that exist.
        refused_ops: reduce operations that do not exist there.
        same_shape: whether shapes must agree; otherwise only the number of elements.
        ordered_tags: whether point-to-point messages match in the order they were posted, with equal tags.
        ignores_tags: whether tags play no part.
        buffered_sends: whether a send completes before its receive is posted.
        any_source: whether a receive without a source exists.
        uneven: whether ``all_gather`` and ``reduce_scatter`` take tensors of different sizes.
    """

    name: str
    dtypes: frozenset[torch.dtype] | None
    refused_ops: frozenset[str]
    same_shape: bool
    ordered_tags: bool
    ignores_tags: bool
    buffered_sends: bool
    any_source: bool
    uneven: bool


STRICT = Profile("strict", None, frozenset(), True, True, False, False, True, True)
GLOO = Profile("gloo", _GLOO_DTYPES, frozenset({"PREMUL_SUM"}), False, False, False, True, True, False)
NCCL = Profile("nccl", _NCCL_DTYPES, _BITWISE, False, True, True, False, False, True)
PROFILES = ("strict", "gloo", "nccl")


def check_profile(name: str) -> None:
    """Raise :class:`ConfigError` unless ``name`` is one of :data:`PROFILES`."""
    if name not in PROFILES:
        raise ConfigError(f"profile={name!r} is unknown: expected one of {', '.join(PROFILES)}")


def profile_for(profile: str, backend: str) -> Profile:
    """The rules for a group made with ``backend`` in a world of the given profile."""
    if profile == "gloo":
        return GLOO
    if profile == "nccl":
        return NCCL
    names = {part.rpartition(":")[2] for part in backend.lower().split(",")}
    if names == {"gloo"}:
        return Profile("strict", _GLOO_DTYPES, GLOO.refused_ops, True, True, False, False, True, False)
    if names == {"nccl"}:
        return Profile("strict", _NCCL_DTYPES, NCCL.refused_ops, True, True, False, False, False, True)
    return STRICT
