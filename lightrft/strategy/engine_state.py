"""The states of an inference engine, and which moves lead from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import TypeVar

from lightrft.errors import ConfigError, EngineStateError, StaleWeightsError
from lightrft.strategy.utils.call_sites import call_site

__all__ = ["TAGS", "EngineState", "EngineStatus"]

T = TypeVar("T")

TAGS = ("weights", "kv_cache")
"""What an engine frees when it sleeps, and takes again when it wakes up, in this order."""


class EngineStatus(StrEnum):
    """What state an engine is in, ``strategy.inference_engine_status``."""

    ABSENT = "absent"
    AWAKE = "awake"
    ASLEEP = "asleep"
    STALE = "stale"
    UPDATING = "updating"
    DEAD = "dead"


class EngineState:
    """The state of one engine. Every move is a method that takes what carries it out.

    A move that is not allowed raises before anything is carried out, and names the line of the call and the line of
    the move that led to the present state. One that leads to the state that the engine is in already does nothing.

    ==========  ==========================================  ================================================
    state       left by                                     allowed
    ==========  ==========================================  ================================================
    awake       ``sleep``                                   everything
    asleep      ``wake_up`` of all tags                     ``sleep`` at the same level; ``update`` once the
                                                            weights are awake
    stale       ``update``                                  everything but ``generate``
    updating    the end of ``update``                       nothing
    dead        nothing                                     nothing
    ==========  ==========================================  ================================================

    An engine is stale once a sleep at level 2 has dropped its weights, or an update has failed half-way; it may be
    asleep at the same time, which is what ``status`` says then.

    Args:
        name: of the engine, for messages.
    """

    def __init__(self, name: str = "the engine") -> None:
        self.name = name
        self.weight_version = 0
        self._asleep: frozenset[str] = frozenset()
        self._level = 0
        self._slept_at = ""
        self._stale = ""
        self._updating_at = ""
        self._dead = ""

    @property
    def status(self) -> EngineStatus:
        """The state; a stale engine that sleeps is asleep."""
        if self._dead:
            return EngineStatus.DEAD
        if self._updating_at:
            return EngineStatus.UPDATING
        if self._asleep:
            return EngineStatus.ASLEEP
        return EngineStatus.STALE if self._stale else EngineStatus.AWAKE

    @property
    def asleep(self) -> frozenset[str]:
        """The tags that are asleep."""
        return self._asleep

    @property
    def is_stale(self) -> bool:
        """Whether its weights are dropped or half updated."""
        return bool(self._stale)

    def generate(self, carry_out: Callable[[], T]) -> T:
        """Generate: the engine stays as it is, also if it fails.

        Raises:
            EngineStateError: it is asleep, updating or dead.
            StaleWeightsError: its weights are dropped, or half updated.
        """
        self.check("generate")
        if self._asleep:
            self._refuse("generate", f"{self._sleep_story()}; call wake_up first")
        if self._stale:
            raise StaleWeightsError(
                f"generate at {call_site()}: {self.name} {self._stale}; send the weights with update_engine_weights "
                "first"
            )
        return carry_out()

    def sleep(self, level: int, carry_out: Callable[[], object]) -> None:
        """Go to sleep.

        Args:
            level: 1 keeps the weights (in the memory of the host), 2 drops them.
            carry_out: not called if the engine sleeps at this level already.

        Raises:
            ConfigError: there is no such level.
            EngineStateError: it is updating or dead, half awake, or asleep at another level.
        """
        if level not in (1, 2):
            raise ConfigError(f"sleep level {level!r}: expected 1 (weights are kept) or 2 (weights are dropped)")
        self.check("sleep")
        if self._asleep == frozenset(TAGS) and self._level == level:
            return
        if self._asleep:
            self._refuse("sleep", f"{self._sleep_story()}; call wake_up first")
        carry_out()
        self._asleep, self._level, self._slept_at = frozenset(TAGS), level, call_site()
        if level == 2:
            self._stale = f"has dropped its weights, by a sleep at level 2 at {self._slept_at}"

    def wake_up(self, tags: Iterable[str] | None, carry_out: Callable[[list[str]], object]) -> None:
        """Wake up, wholly or in part: the engine is asleep until all tags are awake.

        Args:
            tags: some of ``TAGS``; ``None`` is all of them.
            carry_out: gets those of ``tags`` that are asleep, in the order of ``TAGS``; not called if none is.

        Raises:
            ConfigError: there is no such tag.
            EngineStateError: it is updating or dead.
        """
        wanted = list(TAGS if tags is None else tags)
        unknown = [tag for tag in wanted if tag not in TAGS]
        if unknown or isinstance(tags, str):
            raise ConfigError(f"wake_up(tags={tags!r}): expected a list of some of {', '.join(TAGS)}")
        self.check("wake_up")
        sleeping = [tag for tag in TAGS if tag in wanted and tag in self._asleep]
        if not sleeping:
            return
        carry_out(sleeping)
        self._asleep -= frozenset(sleeping)

    def update(self, version: int, carry_out: Callable[[], object]) -> None:
        """Replace the weights, all of them.

        If it fails the engine is stale: nothing tells which weights arrived.

        Args:
            version: of the new weights, larger than that of the present ones.
            carry_out: what replaces them.

        Raises:
            EngineStateError: it is asleep and its weights are too, or it is updating or dead; or the version is no
                larger.
        """
        self.check_weights("update_weights")
        if version <= self.weight_version:
            raise EngineStateError(
                f"update_weights at {call_site()}: version {version} does not follow version {self.weight_version}, "
                f"which {self.name} holds"
            )
        self._updating_at = call_site()
        try:
            carry_out()
        except BaseException:
            self._stale = f"holds a part of new weights, since an update at {self._updating_at} failed"
            raise
        else:
            self._stale = ""
            self.weight_version = version
        finally:
            self._updating_at = ""

    def spoil(self, reason: str) -> None:
        """The weights are of no use until the next update; ``reason`` completes "the engine ..."."""
        self._stale = f"{reason} at {call_site()}"

    def end(self, reason: str) -> None:
        """The engine is dead from now on; ``reason`` completes "the engine ..."."""
        self._dead = self._dead or f"{reason} at {call_site()}"

    def check(self, move: str) -> None:
        """Refuse ``move`` while the engine is updating or dead.

        Raises:
            EngineStateError: it is.
        """
        if self._dead:
            self._refuse(move, f"{self.name} {self._dead}; call setup_inference_engine for a new one")
        if self._updating_at:
            self._refuse(move, f"{self.name} is being updated, since {self._updating_at}")

    def check_weights(self, move: str) -> None:
        """Refuse ``move``, which needs the weights, while they are asleep, and while the engine is updating or dead.

        Raises:
            EngineStateError: they are, or it is.
        """
        self.check(move)
        if "weights" in self._asleep:
            self._refuse(move, f"{self._sleep_story()}; wake its weights up first")

    def _refuse(self, move: str, why: str) -> None:
        raise EngineStateError(f"{move} at {call_site()}: {why}")

    def _sleep_story(self) -> str:
        part = "" if self._asleep == frozenset(TAGS) else f" ({', '.join(sorted(self._asleep))} still)"
        return f"{self.name} is asleep{part}, at level {self._level} since {self._slept_at}"
