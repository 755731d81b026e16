"""Random generators of the process: read and written as memory, and only where somebody has drawn.

A look at the head of a generator's memory tells whether it was used since. A spare Gaussian, which a draw may consume
without touching the head, makes a generator count as used.
"""

from __future__ import annotations

import ctypes
import functools
import random
import sys
from typing import Any

import numpy as np
import torch

__all__ = ["LazyGenerator", "fresh_states", "generators"]


class PythonRandom:
    """Python's module-level generator: 625 words behind the object header, plus the spare Gaussian."""

    _SIZE = 4 * 625

    def __init__(self) -> None:
        self._generator: Any = random.random.__self__  # type: ignore[attr-defined]
        address = id(self._generator) + object.__basicsize__
        self._address = address
        self._head = (ctypes.c_char * 16).from_address(address)
        if not self._layout_is_known():
            raise RuntimeError("the memory of this interpreter's random generator is not laid out as expected")

    def _layout_is_known(self) -> bool:
        words = (ctypes.c_uint32 * 625).from_address(self._address)
        state = self._generator.getstate()[1]
        return bool(state[624] == words[0] and state[:624] == tuple(words[1:]))

    def peek(self) -> bytes:
        return self._head.raw  # the position and three words: the first word after seeding is the same for every seed

    def read(self) -> tuple[bytes, Any]:
        return ctypes.string_at(self._address, self._SIZE), self._generator.gauss_next

    def write(self, state: tuple[bytes, Any]) -> None:
        ctypes.memmove(self._address, state[0], self._SIZE)
        self._generator.gauss_next = state[1]

    def spare(self, state: tuple[bytes, Any]) -> bool:
        return state[1] is not None


class NumpyRandom:
    """NumPy's legacy global generator: 625 words at a known address; its spare Gaussian only in the full state.

    A state is ``(words, full)``, where ``full`` is the state as NumPy gives it, kept only while there is a spare.
    """

    _SIZE = 4 * 625

    def __init__(self) -> None:
        self._get, self._set = np.random.get_state, np.random.set_state
        generator = np.random.mtrand._rand._bit_generator
        self._address = generator.ctypes.state_address
        self._first = ctypes.c_uint64.from_address(self._address)
        self._position = ctypes.c_uint32.from_address(self._address + 4 * 624)
        self._spare_loaded = False

    def peek(self) -> int:
        return self._first.value << 32 | self._position.value

    def read(self) -> tuple[bytes, Any]:
        full: Any = self._get(legacy=False)
        self._spare_loaded = bool(full["has_gauss"])
        return ctypes.string_at(self._address, self._SIZE), full if self._spare_loaded else None

    def write(self, state: tuple[bytes, Any]) -> None:
        words, full = state
        if full is None and self._spare_loaded:
            self._set({**self._get(legacy=False), "has_gauss": 0, "gauss": 0.0})
        if full is not None:
            self._set(full)
        else:
            ctypes.memmove(self._address, words, self._SIZE)
        self._spare_loaded = full is not None

    def spare(self, state: tuple[bytes, Any]) -> bool:
        return state[1] is not None


class TorchRandom:
    """Torch's generator for the CPU.

    Behind one another in the object: the seed (8 bytes), what is left of the words (4), whether it was seeded (4), the
    next word (4), 624 words, an optional float (8) and an optional double (16), which are the spare Gaussians.
    """

    _SIZE = 2544

    def __init__(self) -> None:
        generator: Any = torch.default_generator
        self._offset = self._find()
        self._address = generator._cdata + self._offset
        self._head = (ctypes.c_char * 24).from_address(self._address)

    def _find(self) -> int:
        """Offset of the seed in the object, the words being where they should."""
        seed = 0x1F2E3D4C5B6A7988
        probe: Any = torch.Generator().manual_seed(seed)
        words = probe.get_state()[24 : 24 + 8 * 624].view(torch.int64).tolist()
        offset = ctypes.string_at(probe._cdata, 256).find(seed.to_bytes(8, sys.byteorder))
        if offset < 0 or list((ctypes.c_uint32 * 624).from_address(probe._cdata + offset + 20)) != words:
            raise UnknownLayoutError
        return offset

    def peek(self) -> bytes:
        return self._head.raw

    def read(self) -> bytes:
        return ctypes.string_at(self._address, self._SIZE)

    def write(self, state: bytes) -> None:
        ctypes.memmove(self._address, state, self._SIZE)

    def spare(self, state: bytes) -> bool:
        return bool(state[2520] or state[2536])

    def fresh(self, seed: int) -> bytes:
        """The state after ``manual_seed(seed)``."""
        generator: Any = torch.Generator().manual_seed(seed)
        return ctypes.string_at(generator._cdata + self._offset, self._SIZE)


class TorchRandomByCalls:
    """As :class:`TorchRandom`, for a release whose generator is laid out in another way: read at every switch."""

    def __init__(self) -> None:
        self._generator = torch.default_generator

    def peek(self) -> object:
        return object()  # never the same: always read

    def read(self) -> torch.Tensor:
        return self._generator.get_state()

    def write(self, state: torch.Tensor) -> None:
        self._generator.set_state(state)

    def spare(self, _state: torch.Tensor) -> bool:
        return True

    def fresh(self, seed: int) -> torch.Tensor:
        """The state after ``manual_seed(seed)``."""
        return torch.Generator().manual_seed(seed).get_state()


class UnknownLayoutError(Exception):
    """A generator's memory does not look as expected."""


@functools.cache
def torch_random() -> TorchRandom | TorchRandomByCalls:
    """The way to torch's generator that works with this release."""
    try:
        return TorchRandom()
    except UnknownLayoutError:
        return TorchRandomByCalls()


class LazyGenerator:
    """Switches one generator lazily: nothing is copied for ranks that never drew from it."""

    def __init__(self, memory: Any, slot: int) -> None:
        self.memory = memory
        self.slot = slot
        self.loaded: Any = None
        self.head: Any = None

    def begin(self) -> Any:
        """The state that the process has now."""
        self.loaded = self.memory.read()
        self.head = self.memory.peek()
        return self.loaded

    def save(self, states: list[Any]) -> None:
        """Note the running rank's state in ``states``, if it may have drawn."""
        memory = self.memory
        if memory.peek() != self.head or memory.spare(self.loaded):
            self.loaded = states[self.slot] = memory.read()
            self.head = memory.peek()

    def load(self, states: list[Any]) -> None:
        """Give the process the state of the rank that runs next."""
        wanted = states[self.slot]
        if wanted is not self.loaded:
            self.memory.write(wanted)
            self.loaded = wanted
            self.head = self.memory.peek()


def generators() -> list[LazyGenerator]:
    """Python's, NumPy's and torch's generator, in the order of :func:`fresh_states`."""
    return [LazyGenerator(memory, slot) for slot, memory in enumerate((PythonRandom(), NumpyRandom(), torch_random()))]


def fresh_states(seed: int) -> list[Any]:
    """States of the generators of a process that has just started, drawn from ``seed``."""
    return [_fresh_python(seed), _fresh_numpy(seed), _fresh_torch(seed)]


@functools.lru_cache(maxsize=2048)
def _fresh_torch(seed: int) -> Any:
    return torch_random().fresh(seed)


@functools.lru_cache(maxsize=2048)
def _fresh_python(seed: int) -> tuple[bytes, Any]:
    _, words, gauss = random.Random(seed).getstate()
    layout = (ctypes.c_uint32 * 625)(words[624], *words[:624])
    return bytes(layout), gauss


@functools.lru_cache(maxsize=2048)
def _fresh_numpy(seed: int) -> tuple[bytes, Any]:
    generator = np.random.MT19937()
    generator._legacy_seeding(seed % 2**32)
    return ctypes.string_at(generator.ctypes.state_address, 4 * 625), None
