"""An engine that generates nothing, and remembers what it is asked and sent."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightrft.errors import EngineStateError, StaleWeightsError
from lightrft.strategy.engine import EngineStatus, RolloutEngine
from lightrft.strategy.engine_state import TAGS
from lightrft.strategy.utils.fingerprints import fingerprint

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Recorder"]


class Recorder(RolloutEngine):
    """Writes down what it is asked.

    Attributes:
        asked: calls, in order.
        requests: those of each call of ``generate``.
        received: of each update, the shape and fingerprint of every tensor by name, in the order in which they came.
        weights: copies of the tensors of the last update.
        buckets: bytes of each bucket of the last update.
        failure: what ``generate`` and ``update_weights`` raise instead; ``update_weights`` after the first bucket.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.requests: list[list[Any]] = []
        self.received: list[list[tuple[str, tuple[int, ...], str]]] = []
        self.weights: dict[str, Tensor] = {}
        self.buckets: list[int] = []
        self.failure: Exception | None = None
        self._asleep: frozenset[str] = frozenset()
        self._stale = False
        self._dead = False
        self._version = 0

    @property
    def status(self) -> EngineStatus:
        """Awake, asleep, stale or dead."""
        if self._dead:
            return EngineStatus.DEAD
        if self._asleep:
            return EngineStatus.ASLEEP
        return EngineStatus.STALE if self._stale else EngineStatus.AWAKE

    @property
    def is_stale(self) -> bool:
        """Whether it has slept at level 2 since the last update."""
        return self._stale

    @property
    def asleep(self) -> frozenset[str]:
        """The tags that sleep."""
        return self._asleep

    @property
    def weight_version(self) -> int:
        """The version of the last update."""
        return self._version

    def generate(self, requests: Any, sampling_params: Any) -> list[Any]:
        """The requests with the parameters, each ``n`` times."""
        self.asked.append("generate")
        self._must_be_able_to_generate()
        self.requests.append(list(requests))
        if self.failure is not None:
            raise self.failure
        return [(one, sampling_params) for one in requests for _ in range(sampling_params.get("n", 1))]

    def sleep(self, level: int = 1) -> None:
        """Go to sleep."""
        self.asked.append(f"sleep {level}")
        self._asleep = frozenset(TAGS)
        self._stale = self._stale or level == 2

    def wake_up(self, tags: Any = None) -> None:
        """Wake up, wholly or in part."""
        self.asked.append(" ".join(["wake", *(tags or ())]))
        self._asleep -= frozenset(TAGS if tags is None else tags)

    def update_weights(self, buckets: Any, version: int) -> None:
        """Copy them."""
        self.asked.append(f"update {version}")
        self._must_be_awake("update_weights", "weights")
        self.buckets, told = [], []
        for bucket in buckets:
            if self.failure is not None:
                raise self.failure
            self.buckets.append(sum(tensor.nbytes for _, tensor in bucket))
            told += [(name, tuple(tensor.shape), fingerprint(tensor)) for name, tensor in bucket]
            self.weights |= {name: tensor.detach().cpu().clone() for name, tensor in bucket}
        self.received.append(told)
        self._version = version
        self._stale = False

    def reset_caches(self) -> None:
        """Nothing."""
        self.asked.append("reset")

    def shutdown(self) -> None:
        """End."""
        self._dead = True

    def _must_be_able_to_generate(self) -> None:
        self._must_be_awake("generate", *self._asleep)
        if self._stale:
            raise StaleWeightsError("generate: the weights were dropped; send them with update_engine_weights first")

    def _must_be_awake(self, call: str, *tags: str) -> None:
        if self._dead or self._asleep & frozenset(tags):
            raise EngineStateError(f"{call}: the engine is {self.status}; wake it first")
