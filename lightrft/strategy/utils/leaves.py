"""Tensors and numbers in nested dicts: taken apart, put together, and compared between ranks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightrft.errors import ConfigError

__all__ = [
    "Layout",
    "Leaf",
    "check_values",
    "disagreement",
    "fingerprint",
    "flatten",
    "members",
    "rebuild",
    "refusal",
    "tensor_kind",
]

Layout = dict[str, str]
"""What a rank holds: for the name of each value, what kind of value it is. Equal on all ranks that agree."""

Path = tuple[Any, ...]


class Leaf(NamedTuple):
    """One value of a nested dict.

    Attributes:
        path: the keys that lead to it; empty if the data is a single value.
        value: a tensor, an int, a float or a bool; or whatever else was given, see :func:`refusal`.
    """

    path: Path
    value: Any

    @property
    def name(self) -> str:
        """The path as people read it, such as ``actor/loss``."""
        plain = (key if isinstance(key, str) and "/" not in key else repr(key) for key in self.path)
        return "/".join(plain) or "the value"

    @property
    def size(self) -> int:
        """Number of elements; 1 for a number."""
        return self.value.numel() if isinstance(self.value, Tensor) else 1


def flatten(data: Any) -> list[Leaf]:
    """All values of ``data``, in an order that depends on the keys only and not on how they were inserted.

    Args:
        data: a tensor, a Python or NumPy number, or a mapping of these, which may be nested.
    """
    return sorted(_walk(data, ()), key=lambda leaf: repr(leaf.path))


def _walk(data: Any, path: Path) -> Iterator[Leaf]:
    if isinstance(data, Mapping):
        for key, value in data.items():
            yield from _walk(value, (*path, key))
    else:
        yield Leaf(path, data.item() if isinstance(data, np.generic) else data)


def refusal(value: Any) -> str:
    """Why ``value`` cannot travel, as the end of a sentence that begins with its name; empty if it can."""
    if isinstance(value, DTensor):
        return "a DTensor: give its full_tensor() or to_local()"
    if not isinstance(value, Tensor | int | float):
        return f"a {type(value).__name__}: expected a tensor, a number, or a dict of these"
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        return "an integer of more than 64 bits: give a float"
    return ""


def check_values(refusals: Layout) -> None:
    """Raise :class:`ConfigError` for the first of ``refusals``: why it cannot travel, by the name of the value."""
    for name, why in refusals.items():
        raise ConfigError(f"{name} is {why}")


def rebuild(data: Any, values: Mapping[Path, Any], path: Path = ()) -> Any:
    """A copy of ``data`` in which the value at each path is that of ``values``; mappings become plain dicts."""
    if not isinstance(data, Mapping):
        return values[path]
    return {key: rebuild(value, values, (*path, key)) for key, value in data.items()}


# -- what ranks agree on ----------------------------------------------------------------------------------------------


def tensor_kind(tensor: Tensor, shape: Sequence[int | str]) -> str:
    """What a layout says of a tensor, of whose shape ``shape`` has to agree."""
    return f"a {str(tensor.dtype).removeprefix('torch.')} tensor of shape ({', '.join(map(str, shape))})"


def fingerprint(layout: Layout, bits: int) -> int:
    """``bits`` bits that are equal where layouts are, and almost surely differ where they do not."""
    text = "\n".join(f"{name}={kind}" for name, kind in layout.items())
    digest = hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).digest()
    return int.from_bytes(digest) >> (128 - bits)


def members(group: dist.ProcessGroup | None) -> int:
    """Number of ranks in ``group`` (the default group for None); 1 where no group was made.

    Raises:
        ConfigError: this rank is not in the group.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ConfigError(f"rank {dist.get_rank()} is not in the group: only its members may call this")
    return size


def disagreement(call: str, layout: Layout, group: dist.ProcessGroup | None) -> ConfigError:
    """What to raise on every rank of ``group``, where layouts differ. All of them call it: it exchanges the layouts.

    What most ranks hold is taken as right; the message says what the others lack, have in addition, or hold of
    another kind.
    """
    layouts: list[Any] = [None] * members(group)
    dist.all_gather_object(layouts, layout, group=group)
    usual = dict(Counter(tuple(each.items()) for each in layouts).most_common(1)[0][0])
    ranks_by_problem: dict[str, list[int]] = {}
    for rank, each in zip(dist.get_process_group_ranks(group or dist.group.WORLD), layouts, strict=True):
        if each != usual:
            ranks_by_problem.setdefault(_difference(each, usual), []).append(rank)
    problems = "; ".join(f"{_ranks(ranks)} {problem}" for problem, ranks in ranks_by_problem.items())
    return ConfigError(
        f"{call}: the ranks hold different values, {problems}. Expected the same keys on every rank, with equal types, "
        "dtypes and shapes: give the same keys everywhere, also where a batch is empty"
    )


def _difference(layout: Layout, usual: Layout) -> str:
    lacks = [name for name in usual if name not in layout]
    adds = [name for name in layout if name not in usual]
    other = [name for name in layout if name in usual and layout[name] != usual[name]]
    parts = [f"lacks {', '.join(lacks)}"] * bool(lacks) + [f"has {', '.join(adds)} in addition"] * bool(adds)
    parts += [f"holds {layout[name]} for {name} where the others hold {usual[name]}" for name in other]
    return " and ".join(parts)


def _ranks(ranks: Sequence[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
