"""The contract of inference engines, as a strategy sees them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["ENGINE_TYPES", "EngineStatus", "RolloutEngine", "check_engine_type", "is_engine"]

ENGINE_TYPES = ("vllm", "sglang")
"""The engines that ``--engine_type`` names."""


class EngineStatus(StrEnum):
    """What state an engine is in, ``strategy.inference_engine_status``."""

    ABSENT = "absent"
    AWAKE = "awake"
    ASLEEP = "asleep"
    DEAD = "dead"


class RolloutEngine(ABC):
    """What generates: a real engine or a fake one.

    ``sleep`` and ``wake_up`` may be called in any state but ``DEAD``; in the state that they lead to they do nothing.
    """

    @property
    @abstractmethod
    def status(self) -> EngineStatus:
        """The state of the engine, the same on all ranks of its tensor-parallel group."""

    @property
    @abstractmethod
    def weight_version(self) -> int:
        """How often the weights were updated: 0 for those that the engine was built with."""

    @property
    def runs_on_all_ranks(self) -> bool:
        """Whether every rank of the group calls ``generate`` with the same requests; else rank 0 of the group does."""
        return True

    @abstractmethod
    def generate(self, requests: Sequence[Any], sampling_params: Any) -> list[Any]:
        """Completions of ``requests``, in their order.

        Raises:
            EngineStateError: the engine is asleep or dead.
            StaleWeightsError: its weights were dropped by a sleep, and have not been sent again.
        """

    @abstractmethod
    def sleep(self, level: int = 1) -> None:
        """Free the memory of the caches, at level 2 that of the weights too, which are lost by it."""

    @abstractmethod
    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take the memory again: of everything, or of what ``tags`` name."""

    @abstractmethod
    def update_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """Replace the weights by those in ``buckets``, whose names are those of a checkpoint."""

    @abstractmethod
    def reset_caches(self) -> None:
        """Forget whatever was computed with former weights."""

    @abstractmethod
    def shutdown(self) -> None:
        """End the engine. It is ``DEAD`` afterwards."""


def is_engine(candidate: object) -> bool:
    """Whether ``candidate`` generates: a ``RolloutEngine``, or an object of vLLM or SGLang that does."""
    if isinstance(candidate, RolloutEngine):
        return True
    root = type(candidate).__module__.partition(".")[0]
    return root in ENGINE_TYPES and callable(getattr(candidate, "generate", None))


def check_engine_type(engine_type: str) -> str:
    """``engine_type``, if there is such an engine.

    Raises:
        ConfigError: there is none.
    """
    if engine_type not in ENGINE_TYPES:
        raise ConfigError(f"engine_type {engine_type!r}: expected one of {', '.join(ENGINE_TYPES)}")
    return engine_type


def each_engine(engines: object) -> list[Any]:
    """The engines in ``engines``: one, or several in a sequence; ``None`` stands for no engine.

    Raises:
        ConfigError: something else is among them.
    """
    several = list(engines) if isinstance(engines, (list, tuple)) else [engines]
    for one in several:
        if one is not None and not (hasattr(one, "sleep") or hasattr(one, "release_memory_occupation")):
            raise ConfigError(f"{type(one).__name__} is no inference engine: it can neither sleep nor release memory")
    return [one for one in several if one is not None]


def put_to_sleep(engine: Any, level: int = 1) -> None:
    """Put an engine of any kind to sleep; one that sleeps already is left alone."""
    if isinstance(engine, RolloutEngine):
        if engine.status is EngineStatus.AWAKE:
            engine.sleep(level)
    elif hasattr(engine, "sleep"):
        engine.sleep(level=level)
    else:
        engine.release_memory_occupation()


def wake(engine: Any) -> None:
    """Wake an engine of any kind up; one that is awake already is left alone."""
    if isinstance(engine, RolloutEngine):
        if engine.status is EngineStatus.ASLEEP:
            engine.wake_up()
    elif hasattr(engine, "wake_up"):
        engine.wake_up()
    else:
        engine.resume_memory_occupation()


def start(engine_type: str) -> RolloutEngine:
    """Start an engine of a type that :func:`check_engine_type` knows.

    Raises:
        ConfigError: this version has no adapter for it.
    """
    raise ConfigError(
        f"engine_type {engine_type!r}: this version has no adapter for it; set strategy.inference_engine to a "
        "RolloutEngine of your own"
    )
