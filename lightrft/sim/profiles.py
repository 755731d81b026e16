"""What each backend accepts, as data: ``docs/process-group.md`` shows it as a table.

``gloo`` and ``nccl`` behave as that backend, whatever the group is called. ``strict`` refuses whatever any real backend
refuses or corrupts; an operation, dtype or reduction that only one backend has at all is accepted on a group that was
made with that backend, or with no backend in particular.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch

from lightrft.errors import ConfigError

__all__ = ["COMMON_DTYPES", "PROFILES", "Profile", "check_profile", "profile_for"]

PROFILES = ("strict", "gloo", "nccl")

COMMON_DTYPES = frozenset(
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
"""What every collective of every backend accepts."""

_COMPLEX = frozenset({torch.complex64, torch.complex128})
_FP8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
_FP8_FNUZ = frozenset({torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})

_NUMBERS = frozenset({"SUM", "AVG", "PRODUCT", "MIN", "MAX"})
_BITS = frozenset({"BAND", "BOR", "BXOR"})

Operations = frozenset[str]
Dtypes = frozenset[torch.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The rules of one backend, or of several at once. Operations are named as in a :class:`Signature`.

    Attributes:
        name: ``strict``, ``gloo`` or ``nccl``.
        dtypes: what a collective accepts.
        dtypes_of: what it accepts instead, for the operations named here.
        message_dtypes: what send and recv accept; None for everything.
        reductions: names of the reduce operations that exist.
        integer_average: whether AVG accepts integers.
        same_shape: whether the shapes of all members must agree; otherwise only the numbers of elements.
        any_layout: whether an output only has to hold enough elements; otherwise its shape is fixed.
        strided: operations that get tensors right that are not contiguous.
        copying: operations that write results with ``copy_``: version counters advance, and an output that requires
            grad is refused while autograd records.
        raw_input: whether ``all_gather_single`` accepts an input that requires grad while autograd records.
        uneven: operations that accept tensors of different sizes.
        only_here: features that just one backend has: ``any_source`` (recv from anybody), ``self_send`` (isend to
            oneself), ``coalescing`` (the coalescing manager with a device), ``lists_of_ranks``
            (``all_gather_coalesced``), ``futures`` (``get_future`` of a message or a reduce_scatter), ``split``
            (``split_group``).
        ordered_tags: whether messages match in the order they were posted, and their tags must then agree.
        ignores_tags: whether tags play no part.
    """

    name: str
    dtypes: Dtypes
    dtypes_of: Mapping[str, Dtypes] = field(default_factory=dict)
    message_dtypes: Dtypes | None = None
    reductions: frozenset[str]
    integer_average: bool = False
    same_shape: bool = False
    any_layout: bool = False
    strided: Operations = frozenset()
    copying: Operations = frozenset()
    raw_input: bool = True
    uneven: Operations = frozenset()
    only_here: frozenset[str] = frozenset()
    ordered_tags: bool = False
    ignores_tags: bool = False


_SINGLES = frozenset(
    {"all_gather_single", "all_gather_single_coalesced", "reduce_scatter_single", "reduce_scatter_single_coalesced"}
)
_REDUCING = frozenset(
    {
        "all_reduce",
        "all_reduce_coalesced",
        "reduce",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
    }
)
_COPIED_BY_GLOO = _SINGLES | {
    "all_gather",
    "all_gather_coalesced",
    "all_reduce_coalesced",
    "all_to_all",
    "gather",
    "reduce_scatter",
}

GLOO = Profile(
    name="gloo",
    dtypes=COMMON_DTYPES,
    dtypes_of=MappingProxyType(dict.fromkeys(_REDUCING | _SINGLES | {"broadcast"}, COMMON_DTYPES | _COMPLEX)),
    reductions=_NUMBERS | _BITS,
    strided=_COPIED_BY_GLOO,
    copying=_COPIED_BY_GLOO,
    raw_input=False,
    uneven=frozenset({"reduce_scatter"}),
    only_here=frozenset({"any_source", "lists_of_ranks"}),
)

NCCL = Profile(
    name="nccl",
    dtypes=COMMON_DTYPES | _FP8 | _FP8_FNUZ,
    dtypes_of=MappingProxyType(
        dict.fromkeys(_REDUCING, COMMON_DTYPES | _FP8)
        | dict.fromkeys(("all_reduce", "reduce"), COMMON_DTYPES | _FP8 | _COMPLEX)
        | {"broadcast": COMMON_DTYPES | _FP8 | _FP8_FNUZ | _COMPLEX}
    ),
    message_dtypes=COMMON_DTYPES | _FP8 | _FP8_FNUZ,
    reductions=_NUMBERS | {"PREMUL_SUM"},
    integer_average=True,
    any_layout=True,
    copying=frozenset({"all_gather"}),
    uneven=frozenset({"all_gather", "reduce_scatter", "all_to_all"}),
    only_here=frozenset({"self_send", "coalescing", "futures", "split"}),
    ordered_tags=True,
    ignores_tags=True,
)


def check_profile(name: str) -> None:
    """Raise :class:`ConfigError` unless ``name`` is one of :data:`PROFILES`."""
    if name not in PROFILES:
        raise ConfigError(f"profile={name!r} is unknown: expected one of {', '.join(PROFILES)}")


@functools.cache
def profile_for(profile: str, backend: str) -> Profile:
    """The rules for a group made with ``backend`` in a world of the given profile."""
    if profile == "gloo":
        return GLOO
    if profile == "nccl":
        return NCCL
    names = {part.rpartition(":")[2] for part in backend.lower().split(",")}
    offered = [real for real in (GLOO, NCCL) if real.name in names] or [GLOO, NCCL]
    return _strict(offered)


def _strict(offered: list[Profile]) -> Profile:
    """What the backends in ``offered`` have, under the conditions of all backends."""
    operations = {operation for real in offered for operation in real.dtypes_of}
    return Profile(
        name="strict",
        dtypes=frozenset().union(*(real.dtypes for real in offered)),
        dtypes_of={
            operation: frozenset().union(*(real.dtypes_of.get(operation, real.dtypes) for real in offered))
            for operation in operations
        },
        message_dtypes=NCCL.message_dtypes if offered == [NCCL] else None,
        reductions=frozenset().union(*(real.reductions for real in offered)),
        same_shape=True,
        copying=GLOO.copying | NCCL.copying,
        raw_input=False,
        uneven=frozenset().union(*(real.uneven for real in offered)),
        only_here=frozenset().union(*(real.only_here for real in offered)),
        ordered_tags=True,
    )
