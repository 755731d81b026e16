"""What is looked at of an object to see whether somebody has written to it.

Looking is cheap and stays on the surface: the items of a container by identity, of a large one only their number; the
attributes of an instance; one level below, the lengths of containers and the versions of tensors.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import threading
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from lightrft.sim.places import is_user_class

__all__ = ["Contents", "has_containers", "is_container", "is_instance", "mark"]

_MOST_ITEMS = 64
_MOST_BYTES = 512

_MAPPINGS = frozenset({dict, OrderedDict, defaultdict, Counter})
_SEQUENCES = frozenset({list, set, deque, bytearray})
_TENSORS = frozenset({torch.Tensor, torch.nn.Parameter, torch.nn.Buffer})
_NAMESPACES = frozenset({types.SimpleNamespace, argparse.Namespace})
_PLAIN = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes),
        *(torch.device, torch.dtype, torch.Size, pathlib.PosixPath, pathlib.PurePosixPath),
    }
)
"""Types without contents, whose objects are compared by value: who writes what was there has changed nothing."""

_values: Any = dict.values  # not those of a subclass


def mark(value: Any) -> Any:
    """What an object is known by: plain data by itself, everything else by its identity."""
    return value if type(value) in _PLAIN else id(value)


def is_container(value: Any) -> bool:
    """Whether items of ``value`` can be replaced: a container, a tensor, an array."""
    kind = type(value)
    return kind in _MAPPINGS or kind in _SEQUENCES or kind in _TENSORS or kind is np.ndarray


def is_instance(value: Any) -> bool:
    """Whether ``value`` is an object whose attributes are looked at: of a class of the user's, or a network."""
    kind = type(value)
    if kind in _NAMESPACES or isinstance(value, torch.nn.Module):
        return True
    if isinstance(value, (type, types.ModuleType, types.FunctionType, threading.local)):
        return False
    return is_user_class(kind)


def has_containers(value: Any) -> bool:
    """Whether some item of a container is one itself (or will be, as in a ``defaultdict``)."""
    kind = type(value)
    if kind is defaultdict:
        return True
    items = _values(value) if kind in _MAPPINGS else value if kind in (list, deque) else ()
    return any(map(is_container, itertools.islice(items, _MOST_ITEMS)))


class Contents:
    """The contents of some objects.

    What is found when an object is added (which containers it holds, which are large) stays so until it is added anew.
    """

    __slots__ = ("_arrays", "_has_rest", "_mappings", "_sequences", "_sized", "_slots", "_tensors")

    def __init__(self) -> None:
        self._mappings: list[Any] = []
        self._sequences: list[Any] = []
        self._sized: list[Any] = []
        self._tensors: list[torch.Tensor] = []
        self._arrays: list[Any] = []
        self._slots: list[tuple[Any, tuple[str, ...]]] = []
        self._has_rest = False

    def add(self, value: Any) -> None:
        """Look at ``value`` too, if it has contents."""
        kind = type(value)
        if kind in _MAPPINGS:
            self._add_mapping(value)
        elif kind in _SEQUENCES:
            self._add_sequence(value)
        elif is_container(value):
            self._add_part(value)
        elif kind not in _PLAIN and is_instance(value):
            self._add_instance(value)

    def _add_mapping(self, value: Any) -> None:
        if dict.__len__(value) > _MOST_ITEMS:
            self._sized.append(value)
        else:
            self._mappings.append(value)
            self._add_parts(_values(value))

    def _add_sequence(self, value: Any) -> None:
        if len(value) > _MOST_ITEMS:
            self._sized.append(value)
        else:
            self._sequences.append(value)
            self._add_parts(value)

    def _add_parts(self, values: Iterable[Any]) -> None:
        for value in list(values):
            self._add_part(value)

    def _add_part(self, value: Any) -> None:
        """Of what lies inside something else, less is looked at."""
        kind = type(value)
        if kind in _MAPPINGS or kind in _SEQUENCES:
            self._sized.append(value)
        elif kind in _TENSORS:
            if not value.is_inference():
                self._tensors.append(value)
        elif kind is np.ndarray and value.nbytes <= _MOST_BYTES and not value.dtype.hasobject:
            self._arrays.append(value)

    def _add_instance(self, value: Any) -> None:
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            self._add_mapping(attributes)
        slots = tuple(name for cls in type(value).__mro__ for name in _slots(cls))
        if slots:
            self._slots.append((value, slots))
        if isinstance(value, dict):
            self._add_mapping(value)
        elif isinstance(value, torch.nn.Module):
            everything = itertools.chain(value.parameters(), value.buffers())
            self._add_parts(itertools.islice(everything, _MOST_ITEMS))

    def join(self, other: Contents) -> None:
        """Look at what ``other`` looks at, too."""
        self._mappings += other._mappings
        self._sequences += other._sequences
        self._sized += other._sized
        self._tensors += other._tensors
        self._arrays += other._arrays
        self._slots += other._slots
        self._has_rest = bool(self._sized or self._tensors or self._arrays or self._slots)

    def glance(self) -> Any:
        """Differs from an earlier one if there was a write; it may differ without."""
        return (
            self._mappings and [tuple(map(id, _values(mapping))) for mapping in self._mappings],
            self._sequences and [tuple(map(id, sequence)) for sequence in self._sequences],
            self._rest(id) if self._has_rest else None,
        )

    def look(self) -> Any:
        """Differs from an earlier one if there was a write that changed anything. Holds on to plain data alone."""
        return (
            self._mappings and [tuple(map(mark, list(_values(mapping)))) for mapping in self._mappings],
            self._sequences and [tuple(map(mark, list(sequence))) for sequence in self._sequences],
            self._rest(mark),
        )

    def _rest(self, known: Any) -> tuple[Any, ...]:
        return (
            self._sized and list(map(len, self._sized)),
            self._tensors and [tensor._version for tensor in self._tensors],
            self._arrays and [array.tobytes() for array in self._arrays],
            [[known(getattr(value, name, None)) for name in names] for value, names in self._slots]
            if self._slots
            else None,
        )


def _slots(cls: type) -> tuple[str, ...]:
    names = vars(cls).get("__slots__", ())
    return tuple(
        name for name in ((names,) if isinstance(names, str) else names) if name not in ("__dict__", "__weakref__")
    )
