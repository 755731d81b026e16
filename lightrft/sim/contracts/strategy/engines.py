"""ST501 and on: what a strategy does with inference engines, whatever they are."""

from __future__ import annotations

from typing import Any

from lightrft.errors import ConfigError, EngineStateError
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.subject import Make, Subject, refused
from lightrft.strategy.engine import EngineStatus, RolloutEngine, is_engine


class Recorder(RolloutEngine):
    """An engine that generates nothing and writes down what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._status = EngineStatus.AWAKE

    @property
    def status(self) -> EngineStatus:
        """Awake or asleep."""
        return self._status

    @property
    def weight_version(self) -> int:
        """Never updated."""
        return 0

    def generate(self, requests: Any, sampling_params: Any) -> list[Any]:
        """The requests."""
        self.asked.append("generate")
        return [(one, sampling_params) for one in requests]

    def sleep(self, level: int = 1) -> None:
        """Go to sleep."""
        self.asked.append(f"sleep {level}")
        self._status = EngineStatus.ASLEEP

    def wake_up(self, tags: Any = None) -> None:  # noqa: ARG002
        """Wake up."""
        self.asked.append("wake")
        self._status = EngineStatus.AWAKE

    def update_weights(self, buckets: Any, version: int) -> None:
        """Nothing."""

    def reset_caches(self) -> None:
        """Nothing."""

    def shutdown(self) -> None:
        """End."""
        self._status = EngineStatus.DEAD


def _before(make: Make) -> list[str]:
    strategy = make()
    strategy.wakeup_inference_engine()
    strategy.maybe_sleep_inference_engine()
    strategy.engines_sleep([None])
    return [
        str(strategy.inference_engine_status),
        refused(lambda: strategy.setup_inference_engine(engine_type="llama"), ConfigError),
        refused(lambda: strategy.gather_and_generate(None, all_prompt_token_ids=[[1]]), EngineStateError),
        refused(lambda: strategy.update_engine_weights(None), EngineStateError),  # type: ignore[arg-type]
        refused(lambda: strategy.engines_sleep([object()]), ConfigError),
    ]


@contract.check(501)
def check_there_is_no_engine_at_first(subject: Subject) -> None:
    """Sleep and wake are safe without an engine; whatever needs one says how to get it; an unknown type is refused (K08, K27)."""  # noqa: E501
    for status, unknown, *needing, strange in subject.run(_before):
        told = status == "absent" and "vllm" in unknown and "sglang" in unknown and "object" in strange
        if not told or not all("setup_inference_engine" in message for message in needing):
            raise AssertionError(f"{status!r}, {unknown!r}, {needing!r}, {strange!r}")


def _sleeps(make: Make) -> list[Any]:
    strategy, stubborn = make(), make(enable_engine_sleep=False)
    engine, other = Recorder(), Recorder()
    strategy.inference_engine, strategy.inference_engine_type = engine, "vllm"
    stubborn.inference_engine = other
    strategy.maybe_sleep_inference_engine()
    strategy.maybe_sleep_inference_engine()
    asleep = str(strategy.inference_engine_status)
    strategy.wakeup_inference_engine()
    strategy.wakeup_inference_engine()
    stubborn.maybe_sleep_inference_engine()
    strategy.engines_sleep([engine, None, other])
    strategy.engines_wake_up([engine, other])
    outputs = strategy.engine_generate_local({"n": 1}, prompt_token_ids=[[1], [2]])
    twice = refused(strategy.setup_inference_engine, EngineStateError)
    assert is_engine(engine)
    assert not is_engine(strategy)
    return [engine.asked, other.asked, asleep, len(outputs), "already" in twice]


@contract.check(502)
def check_engines_sleep_once(subject: Subject) -> None:
    """Sleep and wake reach an engine only if they change its state, and not at all where sleep is disabled (K27)."""
    both = ["sleep 1", "wake"]
    for found in subject.run(_sleeps):
        if found != [[*both, *both, "generate"], both, "asleep", 2, True]:
            raise AssertionError(f"found {found}")
