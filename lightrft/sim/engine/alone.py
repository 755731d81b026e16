"""An adapter on the fake engine where no world puts it in the place of the real one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightrft.sim.engine.faces import faces
from lightrft.strategy import engine as engines
from lightrft.strategy.engine import EngineStatus, RolloutEngine

if TYPE_CHECKING:
    import torch

    from lightrft.strategy.engine_settings import EngineSettings

__all__ = ["start_alone"]


def start_alone(engine_type: str, settings: EngineSettings, mode: str) -> RolloutEngine:
    """Start a fake engine; ``import vllm`` and ``import sglang`` give it during its calls, and at no other time.

    Args:
        engine_type: whose face and whose adapter.
        settings: of the engine.
        mode: one of ``faces.MODES``.

    Raises:
        ConfigError: it refuses the settings.
    """
    with faces(mode):
        return _Alone(engines.start(engine_type, settings), mode)


class _Alone(RolloutEngine):
    """Makes every call of an engine with the faces in place: adapters import parts of the package as they need them."""

    def __init__(self, engine: RolloutEngine, mode: str) -> None:
        self._engine = engine
        self._mode = mode

    @property
    def status(self) -> EngineStatus:
        """See ``RolloutEngine``."""
        return self._engine.status

    @property
    def weight_version(self) -> int:
        """See ``RolloutEngine``."""
        return self._engine.weight_version

    @property
    def runs_on_all_ranks(self) -> bool:
        """See ``RolloutEngine``."""
        return self._engine.runs_on_all_ranks

    @property
    def asleep(self) -> frozenset[str]:
        """See ``RolloutEngine``."""
        return self._engine.asleep

    @property
    def is_stale(self) -> bool:
        """See ``RolloutEngine``."""
        return self._engine.is_stale

    @property
    def takes_seeds(self) -> bool:
        """See ``RolloutEngine``."""
        return self._engine.takes_seeds

    @property
    def weights_dtype(self) -> torch.dtype | None:
        """See ``RolloutEngine``."""
        return self._engine.weights_dtype

    @property
    def tells_weights(self) -> bool:
        """See ``RolloutEngine``."""
        return self._engine.tells_weights

    def generate(self, requests: Sequence[Any], sampling_params: Any) -> list[Any]:
        """See ``RolloutEngine``."""
        with faces(self._mode):
            return self._engine.generate(requests, sampling_params)

    def sleep(self, level: int = 1) -> None:
        """See ``RolloutEngine``."""
        with faces(self._mode):
            self._engine.sleep(level)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """See ``RolloutEngine``."""
        with faces(self._mode):
            self._engine.wake_up(tags)

    def update_weights(self, buckets: Iterable[Sequence[tuple[str, torch.Tensor]]], version: int) -> None:
        """See ``RolloutEngine``."""
        with faces(self._mode):
            self._engine.update_weights(buckets, version)

    def reset_caches(self) -> None:
        """See ``RolloutEngine``."""
        with faces(self._mode):
            self._engine.reset_caches()

    def fingerprints(self) -> Mapping[str, str] | None:
        """See ``RolloutEngine``."""
        with faces(self._mode):
            return self._engine.fingerprints()

    def spoil(self, reason: str) -> None:
        """See ``RolloutEngine``."""
        self._engine.spoil(reason)

    def shutdown(self) -> None:
        """See ``RolloutEngine``."""
        with faces(self._mode):
            self._engine.shutdown()
