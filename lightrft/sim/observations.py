"""What two runs are compared by: the tensors a rank contributes, its random state, what it returns."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import random
import struct
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from types import FrameType

    from lightrft.sim.calls import Call
    from lightrft.sim.rank import SimRank

__all__ = ["Budget", "Contents", "Finding", "RandomState", "contributed", "differing_results", "random_states"]

_BLOCK = 1 << 16
"""Bytes that share one hash where a tensor's contents are not kept."""
_ROOT_ONLY = frozenset({"broadcast", "scatter"})
_PADDED = {"all_gather_object": "local_size", "gather_object": "local_size", "scatter_object_list": "tensor_sizes"}
"""Functions of torch that send pickled objects in buffers with an uninitialised tail: where they note the true size."""
_PLAIN = (bool, int, str, bytes, complex, type(None))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing in which two runs differ.

    Attributes:
        what: such as ``event``, ``random draws of torch``, ``contents of tensor 0``, ``result``.
        first: what the first run had.
        second: what the second run had.
    """

    what: str
    first: str
    second: str


# -- tensors ----------------------------------------------------------------------------------------------------------


class Budget:
    """Memory for the contents of the first run's tensors: they are kept to name the values that differ."""

    def __init__(self, total: int = 256 << 20, largest: int = 1 << 20) -> None:
        self._left = total
        self._largest = largest

    def allows(self, size: int) -> bool:
        """Whether ``size`` bytes may be kept; if so, they are counted."""
        if size > min(self._largest, self._left):
            return False
        self._left -= size
        return True


class Contents(NamedTuple):
    """What a tensor held: its bytes, or one hash for each block of them."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes | None
    hashes: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor, budget: Budget, used: int | None = None) -> Contents:
        """Take down a contiguous tensor; of its first dimension only ``used`` elements, if given."""
        data = _bytes(tensor)
        shape = tuple(tensor.shape)
        if used is not None:
            data, shape = data[: used * tensor.element_size()], (used,)
        hashes = tuple(hash(data[start : start + _BLOCK]) for start in range(0, len(data), _BLOCK))
        return cls(tensor.dtype, shape, data if budget.allows(len(data)) else None, hashes)

    def compare(self, other: Contents, what: str) -> Finding | None:
        """What differs first from the ``other``, which is the second run's; None if nothing does."""
        if (self.dtype, self.shape) != (other.dtype, other.shape):
            return Finding(what=what, first=self._kind(), second=other._kind())
        if self.hashes == other.hashes:
            return None
        block = next(i for i, (a, b) in enumerate(zip(self.hashes, other.hashes, strict=True)) if a != b)
        if self.data is None or other.data is None:
            low, high = (_BLOCK * n // self.dtype.itemsize for n in (block, block + 1))
            where = f"first differs among the elements {low} to {min(high, math.prod(self.shape)) - 1}, counted flat"
            hidden = "(too large to keep)"
            return Finding(what=f"{what}, which {where}", first=hidden, second=hidden)
        here = next(i for i in range(block * _BLOCK, len(self.data)) if self.data[i] != other.data[i])
        element = here // self.dtype.itemsize
        index = [int(i) for i in np.unravel_index(element, self.shape)]
        first, second = self._value(element), other._value(element)
        return Finding(what=f"{what}, first at {index}", first=first, second=second)

    def _kind(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"

    def _value(self, element: int) -> str:
        assert self.data is not None
        size = self.dtype.itemsize
        with torch._C.DisableTorchFunction():
            raw = torch.frombuffer(bytearray(self.data[element * size : (element + 1) * size]), dtype=torch.uint8)
            return repr(raw.view(self.dtype)[0].item())


def _bytes(tensor: Tensor) -> bytes:
    """The memory of a contiguous tensor, read past whatever mode is active on the rank's thread."""
    size = tensor.numel() * tensor.element_size()
    return ctypes.string_at(tensor.data_ptr(), size) if size else b""


def contributed(call: Call, inputs: Sequence[Any], budget: Budget) -> tuple[Any, ...]:
    """What the rank of ``call`` contributes: the contents of tensors, and other arguments as they are.

    A buffer that only receives is not looked at, nor the tail behind a pickled object: nobody has initialised them.
    """
    signature = call.signature
    if signature.operation in _ROOT_ONLY and signature.root != call.rank:
        return ()
    sizes = _object_sizes(inputs)
    taken: list[Any] = []
    for position, value in enumerate(inputs):
        if isinstance(value, Tensor):
            taken.append(Contents.of(value, budget, sizes[position] if sizes else None))
        else:
            taken.append(tuple(value) if isinstance(value, list) else value)
    return tuple(taken)


def _object_sizes(inputs: Sequence[Any]) -> list[int]:
    """True sizes of the pickled objects in ``inputs``; empty if they are no such buffers."""
    if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].dtype != torch.uint8:
        return []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_name
        if name in _PADDED and frame.f_globals.get("__name__") == "torch.distributed.distributed_c10d":
            sizes: Any = frame.f_locals.get(_PADDED[name], [])
            return [int(size) for size in (sizes if isinstance(sizes, list) else [sizes])]
        frame = frame.f_back
    return []


# -- random state -----------------------------------------------------------------------------------------------------


class RandomState(NamedTuple):
    """State of one generator: a hash of it, and what tells a reader most."""

    name: str
    digest: int
    detail: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        known = [f"{name} {value}" for name, value in self.detail]
        return ", ".join([*known, f"state {self.digest & 0xFFFFFFFF:08x}"])


def random_states(rank: SimRank) -> tuple[RandomState, ...]:
    """The generators of the rank that runs: torch's, Python's, NumPy's, and torch's for simulated devices."""
    state = _bytes(torch.default_generator.get_state())
    position = struct.unpack_from("=Q", state, 16)[0]
    python = random.getstate()
    numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002 - the generator that is asked about
    key, place = numpy["state"]["key"], numpy["state"]["pos"]
    devices = [(index, philox.seed, philox.offset) for index, philox in sorted(rank.accelerator._generators.items())]
    return (
        RandomState("torch", hash(state), (("seed", torch.default_generator.initial_seed()), ("position", position))),
        RandomState("python", hash(python), (("position", python[1][-1]),)),
        RandomState(
            "numpy", hash((key.tobytes(), place, numpy["has_gauss"], numpy["gauss"])), (("position", int(place)),)
        ),
        RandomState("torch.cuda", hash(tuple(devices)), tuple((f"cuda:{i} seed {s} offset", o) for i, s, o in devices)),
    )


# -- results ----------------------------------------------------------------------------------------------------------


def differing_results(first: Any, second: Any) -> Finding | None:
    """The first place at which what two runs returned differs.

    Looks into containers, dataclasses, tensors, arrays and modules. Other objects are compared only if their class
    says what equality means; where it does not, nothing is said.
    """
    return _Results().compare(first, second, "result")


class _Results:
    def __init__(self) -> None:
        self._seen: set[tuple[int, int]] = set()

    def compare(self, a: Any, b: Any, what: str) -> Finding | None:
        if a is b or (id(a), id(b)) in self._seen:
            return None
        self._seen.add((id(a), id(b)))
        if type(a) is not type(b):
            same_name = type(a).__qualname__ == type(b).__qualname__  # a class made anew by each run
            return None if same_name else self._unequal(a, b, what)
        if isinstance(a, Tensor):
            return _contents(a).compare(_contents(b), what)
        parts = _parts(a), _parts(b)
        if parts[0] is None or parts[1] is None:
            return None if _equal(a, b) else self._unequal(a, b, what)
        if list(parts[0]) != list(parts[1]):
            return self._unequal(a, b, what)
        found = (self.compare(value, parts[1][name], f"{what}{name}") for name, value in parts[0].items())
        return next(filter(None, found), None)

    def _unequal(self, a: Any, b: Any, what: str) -> Finding:
        return Finding(what=what, first=_short(a), second=_short(b))


def _contents(tensor: Tensor) -> Contents:
    return Contents.of(
        tensor.detach().resolve_conj().resolve_neg().contiguous(), Budget(largest=1 << 40, total=1 << 40)
    )


def _parts(value: Any) -> dict[str, Any] | None:
    """The parts of a value by how one gets at them; None if it is compared as a whole."""
    if isinstance(value, dict):
        plain = all(isinstance(key, (*_PLAIN, float)) for key in value)
        return {f"[{key!r}]": part for key, part in value.items()} if plain else {}
    if isinstance(value, (list, tuple)):
        return {f"[{index}]": part for index, part in enumerate(value)}
    if isinstance(value, torch.nn.Module):
        return {f".{name}": part for name, part in value.state_dict().items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f".{field.name}": getattr(value, field.name, None) for field in dataclasses.fields(value)}
    return None


def _equal(a: Any, b: Any) -> bool:
    """False only if ``a`` and ``b``, of one type, are known to differ."""
    kind: Any = type(a)
    if isinstance(a, float):
        return a == b or (a != a and b != b)  # noqa: PLR0124 - not a number
    if isinstance(a, np.ndarray):
        same = (a.dtype, a.shape) == (b.dtype, b.shape)
        return a.dtype == object or (same and a.tobytes() == b.tobytes())
    if isinstance(a, (set, frozenset)) and not all(isinstance(part, (*_PLAIN, float)) for part in a | b):
        return True
    if not isinstance(a, _PLAIN) and kind.__eq__ is object.__eq__:
        return True
    try:
        answer = a == b
    except Exception:  # noqa: BLE001 - the comparison is the user's code
        return True
    return answer if isinstance(answer, bool) else True


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
