"""The contract of inference engines, as a strategy sees them."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError, WeightSyncError
from lightrft.strategy.engine_state import TAGS, EngineState, EngineStatus
from lightrft.strategy.requests import Completion, Request, request_of
from lightrft.strategy.sampling import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch

    from lightrft.strategy.engine_settings import EngineSettings

__all__ = ["ENGINE_TYPES", "EngineStatus", "RolloutEngine", "StatefulEngine", "check_engine_type", "is_engine"]

ENGINE_TYPES = ("vllm", "sglang")
"""The engines that ``--engine_type`` names."""


class RolloutEngine(ABC):
    """What generates: a real engine or a fake one.

    In which state which call is allowed is said by ``EngineState``. ``sleep`` and ``wake_up`` do nothing in the state
    that they lead to.
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
    def asleep(self) -> frozenset[str]:
        """Those of ``TAGS`` that sleep: none of an engine that is awake, and some of one that woke up in part."""
        return frozenset(TAGS) if self.status is EngineStatus.ASLEEP else frozenset()

    @property
    def is_stale(self) -> bool:
        """Whether it needs new weights before it generates, awake or asleep; what sleeps may not be able to tell."""
        return self.status is EngineStatus.STALE

    @property
    def runs_on_all_ranks(self) -> bool:
        """Whether every rank of the group calls ``generate`` with the same requests; else rank 0 of the group does."""
        return True

    @property
    def takes_seeds(self) -> bool:
        """Whether sampling parameters may have a seed, so that completions can be repeated."""
        return True

    @abstractmethod
    def generate(self, requests: Sequence[Any], sampling_params: Any) -> list[Any]:
        """Completions of ``requests``, in their order; those of one request follow each other.

        Args:
            requests: see ``Request``.
            sampling_params: what ``SamplingParams.of`` takes.

        Raises:
            ConfigError: the engine cannot do what a request or the parameters ask for.
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
        """Replace the weights by those in ``buckets``.

        Args:
            buckets: names of a checkpoint and whole tensors, every weight once; a bucket is good until the next is
                asked for, its tensors until the update ends. All are read, and none is kept longer than it has to be.
            version: of the new weights; larger than ``weight_version``.

        Raises:
            EngineStateError: the engine is asleep or dead.
            WeightSyncError: weights do not fit the model, or some are missing, or what gives the buckets fails. The
                engine is stale then.
        """

    @abstractmethod
    def reset_caches(self) -> None:
        """Forget whatever was computed with former weights."""

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """To which floating-point weights are rounded that it is sent; ``None`` if to none, or it is not known."""
        return None

    @property
    def tells_weights(self) -> bool:
        """Whether ``fingerprints`` can be asked."""
        return type(self).fingerprints is not RolloutEngine.fingerprints

    def fingerprints(self) -> Mapping[str, str] | None:
        """The ``fingerprint`` of each weight that the engine holds, by name; ``None`` if it cannot tell. *Collective*.

        It reads all of them, which takes as long as it takes.

        Raises:
            EngineStateError: its weights are asleep, or it is dead.
        """
        return None

    def spoil(self, reason: str) -> None:
        """Generate no more until the next update: the weights are others than they should be.

        An engine that has no such state ends.

        Args:
            reason: completes "the engine ...".
        """
        del reason
        self.shutdown()

    @abstractmethod
    def shutdown(self) -> None:
        """End the engine. It is ``DEAD`` afterwards."""


class StatefulEngine(RolloutEngine):
    """An engine that keeps to ``EngineState``: every call is checked before an implementation carries it out.

    Args:
        name: of the engine, for messages.
    """

    def __init__(self, name: str) -> None:
        self.state = EngineState(name)

    @property
    def status(self) -> EngineStatus:
        """The state of the engine."""
        return self.state.status

    @property
    def weight_version(self) -> int:
        """How often the weights were updated."""
        return self.state.weight_version

    @property
    def asleep(self) -> frozenset[str]:
        """The tags that sleep."""
        return self.state.asleep

    @property
    def is_stale(self) -> bool:
        """Whether its weights are dropped or half updated."""
        return self.state.is_stale

    def generate(self, requests: Sequence[Any], sampling_params: Any) -> list[Completion]:
        """See ``RolloutEngine``."""
        params = SamplingParams.of(sampling_params)
        wanted = [request_of(one) for one in requests]
        return self.state.generate(lambda: self._generate(wanted, params) if wanted else [])

    def sleep(self, level: int = 1) -> None:
        """See ``RolloutEngine``."""
        self.state.sleep(level, lambda: self._sleep(level))

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """See ``RolloutEngine``."""
        self.state.wake_up(tags, self._wake_up)

    def update_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """See ``RolloutEngine``."""
        self.state.update(version, lambda: self._load_all(iter(buckets)))

    def _load_all(self, buckets: Iterator[Sequence[tuple[str, torch.Tensor]]]) -> None:
        self._load(buckets)
        if next(buckets, None) is not None:
            raise WeightSyncError(f"{self.state.name} stopped reading before the last bucket")

    def reset_caches(self) -> None:
        """See ``RolloutEngine``."""
        self.state.check("reset_caches")
        self._reset_caches()

    @property
    def tells_weights(self) -> bool:
        """See ``RolloutEngine``."""
        own = type(self)
        return (own.fingerprints, own._fingerprints) != (StatefulEngine.fingerprints, StatefulEngine._fingerprints)

    def fingerprints(self) -> Mapping[str, str] | None:
        """See ``RolloutEngine``."""
        self.state.check_weights("fingerprints")
        return self._fingerprints()

    def spoil(self, reason: str) -> None:
        """See ``RolloutEngine``."""
        self.state.spoil(reason)

    def shutdown(self) -> None:
        """See ``RolloutEngine``. A second call does nothing."""
        if self.status is not EngineStatus.DEAD:
            self.state.end("was shut down")
            self._shutdown()

    @abstractmethod
    def _generate(self, requests: list[Request], params: SamplingParams) -> list[Completion]:
        """Completions of one request or more."""

    @abstractmethod
    def _sleep(self, level: int) -> None:
        """Free what ``level`` says."""

    @abstractmethod
    def _wake_up(self, tags: list[str]) -> None:
        """Take what ``tags`` name, all of them asleep."""

    @abstractmethod
    def _load(self, buckets: Iterator[Sequence[tuple[str, torch.Tensor]]]) -> None:
        """Replace the weights."""

    @abstractmethod
    def _reset_caches(self) -> None:
        """Drop every cache that depends on the weights; nothing while they are asleep."""

    def _fingerprints(self) -> Mapping[str, str] | None:
        """What the engine holds, if it can tell."""
        return None

    @abstractmethod
    def _shutdown(self) -> None:
        """Free everything."""


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


_ASLEEP = "_lightrft_asleep"
"""Mark of an engine of a library that was put to sleep here. SGLang's cannot be asked, and dies of waking up twice."""


def status_of(engine: Any) -> EngineStatus:
    """The state of an engine of any kind; ``None`` is an absent one. What a raw engine did by itself is not seen."""
    if engine is None:
        return EngineStatus.ABSENT
    if isinstance(engine, RolloutEngine):
        return engine.status
    return EngineStatus.ASLEEP if getattr(engine, _ASLEEP, False) else EngineStatus.AWAKE


def put_to_sleep(engine: Any, level: int = 1) -> None:
    """Put an engine of any kind to sleep; one that sleeps already is left alone.

    One that woke up in part wakes up wholly first: libraries take it for one that sleeps, and would free nothing.
    """
    if isinstance(engine, RolloutEngine) and engine.asleep and engine.asleep != frozenset(TAGS):
        engine.wake_up()
    if status_of(engine) not in (EngineStatus.AWAKE, EngineStatus.STALE):
        return
    if isinstance(engine, RolloutEngine):
        engine.sleep(level)
        return
    if hasattr(engine, "sleep"):
        engine.sleep(level=level)
    else:
        engine.release_memory_occupation()
    setattr(engine, _ASLEEP, True)


def wake(engine: Any) -> None:
    """Wake an engine of any kind up; one that is awake already is left alone."""
    if status_of(engine) is not EngineStatus.ASLEEP:
        return
    if isinstance(engine, RolloutEngine):
        engine.wake_up()
        return
    if hasattr(engine, "wake_up"):
        engine.wake_up()
    else:
        engine.resume_memory_occupation()
    setattr(engine, _ASLEEP, False)


def wake_weights(engine: Any) -> None:
    """Wake the weights of an engine up, so that they can be replaced, and leave the rest of it as it is.

    One that does not tell what of it sleeps is woken as a whole.
    """
    if not isinstance(engine, RolloutEngine):
        wake(engine)
    elif "weights" in engine.asleep:
        engine.wake_up(["weights"])


def start(engine_type: str, settings: EngineSettings) -> RolloutEngine:
    """Start an engine of a type that :func:`check_engine_type` knows. *Collective*.

    Raises:
        ConfigError: its package is missing, or it refuses the settings.
    """
    adapter = importlib.import_module(f"lightrft.strategy.{engine_type}_utils")
    engine: RolloutEngine = adapter.start(settings)
    return engine
