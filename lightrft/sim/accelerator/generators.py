"""The random state of a simulated CUDA device.

Like CUDA's, it is a seed and an offset, 16 bytes to read and to write. Draws that name a CUDA device
(``torch.randn(n, device="cuda")``) come from it, apart from the CPU's generator as on a real machine. Draws on a tensor
(dropout, ``x.normal_()``, ``torch.multinomial(p, 1)``) come from the CPU's generator: their tensor is on the CPU.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, overload

import torch

from lightrft.sim.current import current_task

if TYPE_CHECKING:
    from lightrft.sim.accelerator.state import DeviceState

__all__ = ["DefaultGenerators", "DeviceGenerator", "PhiloxState"]

DEFAULT_SEED = 67280421310721
"""``c10::default_rng_seed_val``: the seed that every generator of torch starts with."""
_MASK = (1 << 64) - 1


class PhiloxState:
    """Seed and offset; the offset counts what was drawn, in steps of 4, so equal states draw equal numbers."""

    __slots__ = ("offset", "seed")

    def __init__(self, seed: int = DEFAULT_SEED, offset: int = 0) -> None:
        self.seed = seed
        self.offset = offset

    def restart(self, seed: int) -> None:
        """Begin the sequence of ``seed``; a negative seed counts down from 2**64, as in torch."""
        self.seed = seed & _MASK
        self.offset = 0

    def stream_seed(self) -> int:
        """A seed for a CPU generator that stands in for this state: seed and offset mixed (splitmix64)."""
        mixed = (self.seed * 0x9E3779B97F4A7C15 + self.offset * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15) & _MASK
        mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & _MASK
        return mixed ^ mixed >> 31

    def source(self) -> torch.Generator:
        """A generator for the next draw; call :meth:`advance` after it."""
        _source.manual_seed(self.stream_seed())
        return _source

    def advance(self, drawn: int) -> None:
        """Count ``drawn`` numbers as used."""
        self.offset = (self.offset + max(4, (drawn + 3) // 4 * 4)) & _MASK

    def pack(self) -> torch.Tensor:
        """The state as ``torch.cuda.get_rng_state`` returns it: 16 bytes, uint8."""
        return torch.frombuffer(bytearray(struct.pack("=QQ", self.seed, self.offset)), dtype=torch.uint8)

    def unpack(self, state: torch.Tensor) -> None:
        """Take over a state that :meth:`pack` has made.

        Raises:
            RuntimeError: it is none.
        """
        if state.dtype is not torch.uint8 or state.numel() != 16:
            raise RuntimeError(
                f"RNG state is wrong size: got {state.numel()} elements of {state.dtype}, expected the 16 bytes "
                "(uint8) that torch.cuda.get_rng_state returns"
            )
        self.seed, self.offset = struct.unpack("=QQ", bytes(state.tolist()))


_source = torch._C.Generator()
"""Shared by all ranks: it is seeded before each use, and one rank runs at a time."""


class DeviceGenerator:
    """What ``torch.cuda.default_generators[i]`` gives a rank."""

    def __init__(self, state: DeviceState, index: int) -> None:
        self._state = state
        self._index = index
        self._next_seed = 0

    @property
    def philox(self) -> PhiloxState:
        """The state that this generator reads and writes."""
        return self._state.generator(self._index)

    @property
    def device(self) -> torch.device:
        """The CUDA device it belongs to."""
        return torch.device("cuda", self._index)

    def manual_seed(self, seed: int) -> DeviceGenerator:
        """Restart from ``seed``."""
        self.philox.restart(seed)
        return self

    def initial_seed(self) -> int:
        """The seed last set."""
        return self.philox.seed

    def seed(self) -> int:
        """Restart from a seed that nobody chose; a run with the same history chooses the same one."""
        philox = self.philox
        philox.restart(PhiloxState(philox.stream_seed(), self._state.local_rank + 1).stream_seed())
        return philox.seed

    def get_state(self) -> torch.Tensor:
        """16 bytes."""
        return self.philox.pack()

    def set_state(self, state: torch.Tensor) -> DeviceGenerator:
        """Take over what :meth:`get_state` returned."""
        self.philox.unpack(state)
        return self

    def get_offset(self) -> int:
        """How far the sequence has been used."""
        return self.philox.offset

    def set_offset(self, offset: int) -> None:
        """Go to a place in the sequence."""
        self.philox.offset = offset


class DefaultGenerators:
    """Takes the place of the tuple ``torch.cuda.default_generators``; outside a world it is that tuple."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def _entries(self) -> Any:
        task = current_task()
        if task is None:
            return self._original
        state: DeviceState = task.rank.accelerator
        return tuple(DeviceGenerator(state, index) for index in range(state.device_count))

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Any, ...]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._entries()[index]

    def __len__(self) -> int:
        return len(self._entries())
