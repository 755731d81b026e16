"""Streams and events of the simulated device.

The simulator finishes an operation before it returns, so all work on every stream is always done: waiting returns at
once and a query answers yes. What remains is bookkeeping that programs look at: which stream is current, on which
device, and when an event was recorded.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import torch

from lightrft.sim.accelerator.replace import RankClass, answer, once, wherever_bound
from lightrft.sim.accelerator.state import DeviceState, device_state
from lightrft.sim.patching import Patch

__all__ = ["Event", "Stream", "patches"]

_CUDA_DEVICE_TYPE = 1
"""``c10::DeviceType::CUDA``."""


def _rank() -> DeviceState:
    state = device_state()
    if state is None:
        raise RuntimeError("this stream or event belongs to a simulated rank and was used outside its world")
    return state


class Stream(torch.Stream, metaclass=RankClass):
    """Stands in for ``torch.cuda.Stream`` on a rank; the same arguments."""

    _device_index: int
    _stream_id: int
    _priority: int
    _entered: list[tuple[int, Stream]]

    def __new__(cls, device: Any = None, priority: int = 0, **ids: int) -> Stream:
        """Make a stream on ``device``, or one with the given ``stream_id`` and ``device_index``."""
        state = _rank()
        self = super().__new__(cls, device="cpu")
        if "stream_id" in ids:
            self._device_index, self._stream_id = state.checked(ids["device_index"]), ids["stream_id"]
        else:
            self._device_index, self._stream_id = state.index_of(device), next(state.stream_ids)
        self._priority = priority
        self._entered = []
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The CUDA device the stream is on."""
        return torch.device("cuda", self._device_index)

    @property
    def device_index(self) -> int:  # type: ignore[override]
        """The index of that device."""
        return self._device_index

    @property
    def device_type(self) -> int:  # type: ignore[override]
        """CUDA's number among torch's device types."""
        return _CUDA_DEVICE_TYPE

    @property
    def stream_id(self) -> int:  # type: ignore[override]
        """0 for the default stream, else counted per rank."""
        return self._stream_id

    @property
    def cuda_stream(self) -> int:
        """Stands for the address of the ``cudaStream_t``; 0 for the default stream."""
        return self._stream_id

    @property
    def priority(self) -> int:
        """As given; lower is more urgent."""
        return self._priority

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Lowest and highest priority of the device."""
        return (0, -5)

    def query(self) -> bool:
        """All work is done."""
        return True

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def wait_event(self, event: Any) -> None:
        """Order later work behind ``event``, which is always past."""
        event.wait(self)

    def wait_stream(self, stream: Any) -> None:
        """Order later work behind all work of ``stream``, which is done."""
        self.wait_event(stream.record_event())

    def record_event(self, event: Any = None) -> Any:
        """Record ``event``, or a new one, on this stream and return it."""
        if event is None:
            event = Event()
        event.record(self)
        return event

    def __enter__(self) -> Stream:
        state = _rank()
        before = state.current_device
        self._entered.append((before, current_stream(state, self._device_index)))
        set_stream(state, self)
        return self

    def __exit__(self, *_: object) -> None:
        device, stream = self._entered.pop()
        state = _rank()
        set_stream(state, stream)
        state.current_device = device

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.cuda_stream)

    def __cuda_stream__(self) -> tuple[int, int]:
        """The CUDA stream protocol: version and handle."""
        return (0, self.cuda_stream)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stream):
            return False
        return (self.device_index, self.stream_id) == (other.device_index, other.stream_id)

    def __ne__(self, other: object) -> bool:
        return not self == other  # torch.Stream has one of its own, which compares what is the same in all of ours

    def __hash__(self) -> int:
        return hash((self._device_index, self._stream_id))

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device={self.device} cuda_stream={self.cuda_stream:#x}>"


class Event(torch.Event, metaclass=RankClass):
    """Stands in for ``torch.cuda.Event`` on a rank; the same arguments."""

    _enable_timing: bool
    _recorded: float | None
    _device_index: int | None

    def __new__(
        cls,
        enable_timing: bool = False,
        blocking: bool = False,  # noqa: ARG004
        interprocess: bool = False,  # noqa: ARG004
        external: bool = False,  # noqa: ARG004
    ) -> Event:
        """Make an event; only ``enable_timing`` makes a difference here."""
        _rank()
        self = super().__new__(cls, device="cpu")
        self._enable_timing = enable_timing
        self._recorded = None
        self._device_index = None
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The device it was first recorded on; before that, the current one."""
        return torch.device("cuda", _rank().current_device if self._device_index is None else self._device_index)

    @property
    def cuda_event(self) -> int:
        """Stands for the address of the ``cudaEvent_t``; 0 until recorded."""
        return 0 if self._recorded is None else id(self)

    def record(self, stream: Any = None) -> None:
        """Note the time, on ``stream`` or on the current one.

        Raises:
            RuntimeError: the event was recorded on another device before.
        """
        if stream is None:
            stream = current_stream(_rank())
        if self._device_index is None:
            self._device_index = stream.device_index
        elif self._device_index != stream.device_index:
            raise RuntimeError(
                f"Event device {self._device_index} does not match recording stream's device {stream.device_index}."
            )
        self._recorded = time.perf_counter()

    def wait(self, stream: Any = None) -> None:
        """Order later work of ``stream`` behind the event, which is always past."""

    def query(self) -> bool:
        """All work before the event is done."""
        return True

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to ``end_event``, on the clock the world shows.

        Raises:
            ValueError: one of them keeps no time, or has not been recorded.
        """
        if not (self._enable_timing and end_event._enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self._recorded is None or end_event._recorded is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return float(1000.0 * (end_event._recorded - self._recorded))

    @property
    def _as_parameter_(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.cuda_event)

    def __repr__(self) -> str:
        return f"<torch.cuda.Event {self.cuda_event:#x}>" if self.cuda_event else "<torch.cuda.Event uninitialized>"


def default_stream(state: DeviceState, device: Any = None) -> Stream:
    """The default stream of a device."""
    return Stream(stream_id=0, device_index=state.index_of(device))


def current_stream(state: DeviceState, device: Any = None) -> Stream:
    """The stream that the calling thread has selected on a device."""
    index = state.index_of(device)
    return state.threads.streams.get(index) or default_stream(state, index)


def set_stream(state: DeviceState, stream: Stream | None) -> None:
    """Select a stream and, as CUDA does, its device."""
    if stream is not None:
        state.current_device = stream.device_index
        state.threads.streams[stream.device_index] = stream


def _set_stream_by_id(state: DeviceState, stream_id: int, device_index: int, device_type: int) -> None:  # noqa: ARG001
    set_stream(state, Stream(stream_id=stream_id, device_index=device_index))


def _record_stream(original: Any) -> Any:
    """``Tensor.record_stream``: the allocator of a rank reuses nothing early."""
    original = original or torch.Tensor.record_stream

    def record_stream(self: torch.Tensor, stream: Any) -> None:
        if device_state() is None:
            original(self, stream)

    return record_stream


def _standing_in(cls: Any) -> Any:
    def build(original: Any) -> Any:
        cls.original = original
        return cls

    return once(build)


def patches() -> list[Patch]:
    """Streams and events in ``torch.cuda``."""
    found = [Patch(torch.Tensor, "record_stream", once(_record_stream))]
    classes = {"Stream": _standing_in(Stream), "Event": _standing_in(Event)}
    found += wherever_bound(torch.cuda.streams, classes, within="torch.cuda")
    functions = (default_stream, current_stream, set_stream, _set_stream_by_id)
    return found + wherever_bound(torch.cuda, {function.__name__: answer(function) for function in functions})
