"""EN401 and on: the states of an engine, and what a wrong move says."""

from __future__ import annotations

import functools
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightrft.errors import ConfigError, EngineStateError, LightRFTError, StaleWeightsError
from lightrft.sim.contracts.engine.capabilities import contract
from lightrft.sim.contracts.engine.subject import Subject, buckets_of, counted
from lightrft.sim.contracts.findings import expect, refused
from lightrft.strategy.engine import EngineStatus, RolloutEngine
from lightrft.strategy.engine_state import TAGS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

__all__: list[str] = []

_PLACE = re.compile(rf"{re.escape(__file__)}:(\d+)")


def _places(message: str, count: int) -> None:
    """A message names so many lines of this file: that of the call, and that of the move before it."""
    found = set(_PLACE.findall(message))
    expect(len(found) == count, f"expected {count} places of the caller: {message}")


@contract.check(401)
def check_a_new_engine_holds_what_is_on_disk(subject: Subject) -> None:
    """A new engine is awake, has weight version 0, and generates with the weights of its files."""
    engine = subject.anew()
    expect(engine.status is EngineStatus.AWAKE, f"it is {engine.status}")
    expect(engine.weight_version == 0, f"it has version {engine.weight_version}")
    expect(engine.asleep == frozenset(), f"{set(engine.asleep)} are asleep")
    subject.holds(0, "just started")


@contract.check(402)
def check_sleep_at_level_1_keeps_the_weights(subject: Subject) -> None:
    """Asleep at level 1 it refuses to generate, with the places of both calls; awake again it goes on with the same weights and version."""  # noqa: E501
    engine = subject.fresh()
    version = engine.weight_version
    engine.sleep(1)
    expect(engine.status is EngineStatus.ASLEEP, f"after sleep(1) it is {engine.status}")
    expect(engine.asleep == frozenset(TAGS), f"after sleep(1) {set(engine.asleep)} are asleep")
    message = refused(lambda: engine.generate([{"prompt_token_ids": subject.prompts[0]}], {}), EngineStateError)
    _places(message, 2)
    expect("asleep" in message and "wake_up" in message, f"the message says not what to do: {message}")
    engine.wake_up()
    expect(engine.status is EngineStatus.AWAKE, f"after wake_up() it is {engine.status}")
    expect(engine.weight_version == version, f"version {version} became {engine.weight_version}")
    subject.holds(0, "after a sleep at level 1")


@contract.check(403)
def check_sleep_at_level_2_wants_new_weights(subject: Subject) -> None:
    """After a sleep at level 2 it is stale: generating is a StaleWeightsError with the places of both calls, until an update (F01)."""  # noqa: E501
    engine = subject.fresh()
    engine.sleep(2)
    expect(engine.status is EngineStatus.ASLEEP, f"after sleep(2) it is {engine.status}")
    engine.wake_up()
    expect(engine.status is EngineStatus.STALE, f"awake after sleep(2) it is {engine.status}")
    message = refused(lambda: engine.generate([{"prompt_token_ids": subject.prompts[0]}], {}), StaleWeightsError)
    _places(message, 2)
    expect("update_engine_weights" in message, f"the message says not what to do: {message}")
    engine.sleep(1)
    engine.wake_up()
    expect(engine.status is EngineStatus.STALE, f"a sleep at level 1 made a stale engine {engine.status}")
    subject.send(1)
    subject.holds(1, "after a sleep at level 2 and an update")


def _update(engine: RolloutEngine, buckets: Iterator[list[tuple[str, Tensor]]], version: int) -> None:
    engine.update_weights(buckets, version)


@contract.check(404)
def check_no_update_in_sleep(subject: Subject) -> None:
    """An update while the weights sleep is refused with the places of both calls, reads nothing and changes nothing (F02)."""  # noqa: E501
    engine = subject.fresh()
    for level in (1, 2):
        version = engine.weight_version
        read: list[str] = []
        update = functools.partial(_update, engine, counted(subject.weights(1), read), version + 1)
        engine.sleep(level)
        message = refused(update, EngineStateError)
        _places(message, 2)
        expect("wake" in message, f"the message says not what to do: {message}")
        expect((read, engine.weight_version) == ([], version), f"{len(read)} weights were read, it is at {version}")
        expect(engine.status is EngineStatus.ASLEEP, f"afterwards it is {engine.status}")
        engine.wake_up()
        if level == 1:
            subject.holds(0, "after an update that was refused")


@contract.check(405)
def check_weights_wake_first_for_an_update(subject: Subject) -> None:
    """With its weights awake alone it takes an update, after either level, and is asleep until the caches are awake too; nothing of before is in them (F03, F05)."""  # noqa: E501
    engine = subject.fresh()
    subject.generate()
    for level, index in ((1, 1), (2, 0), (1, 0)):
        engine.sleep(level)
        engine.wake_up(["weights"])
        expect(engine.status is EngineStatus.ASLEEP, f"with weights awake alone it is {engine.status}")
        expect(engine.asleep == {"kv_cache"}, f"with weights awake {set(engine.asleep)} are asleep")
        subject.send(index)
        expect(engine.asleep == {"kv_cache"}, f"after the update {set(engine.asleep)} are asleep")
        message = refused(subject.generate, EngineStateError)
        expect("kv_cache" in message, f"the message does not say what is asleep: {message}")
        engine.wake_up(["kv_cache"])
        expect(engine.status is EngineStatus.AWAKE, f"wholly awake it is {engine.status}")
        subject.holds(index, "after an update with the caches asleep")


@contract.check(406)
def check_sleeping_and_waking_twice_is_once(subject: Subject) -> None:
    """A second sleep at the same level and a second waking up do nothing, in whatever parts and order (K27)."""
    engine = subject.fresh()
    engine.wake_up()
    for tags in (["weights", "kv_cache"], ["kv_cache", "weights"]):
        engine.sleep(1)
        engine.sleep(1)
        for tag in tags:
            engine.wake_up([tag])
            engine.wake_up([tag])
        engine.wake_up([])
        engine.wake_up()
        expect(engine.status is EngineStatus.AWAKE, f"after waking up by {tags} it is {engine.status}")
        subject.holds(0, f"after waking up by {tags}")


@contract.check(407)
def check_wrong_levels_and_tags_are_refused(subject: Subject) -> None:
    """An unknown level or tag names those that there are; half awake, or asleep at another level, it refuses to fall asleep, with the places of both calls (K08)."""  # noqa: E501
    engine = subject.fresh()
    for level in (0, 3):
        message = refused(lambda level=level: engine.sleep(level), ConfigError)  # type: ignore[misc]
        expect("1" in message and "2" in message, f"level {level} was refused by {message!r}")
    for tags in (["weight"], ["weights", "graphs"], "weights"):
        message = refused(lambda tags=tags: engine.wake_up(tags), ConfigError)  # type: ignore[misc]
        expect(all(tag in message for tag in TAGS), f"{tags} was refused by {message!r}")
    expect(engine.status is EngineStatus.AWAKE, f"afterwards it is {engine.status}")
    engine.sleep(1)
    _places(refused(lambda: engine.sleep(2), EngineStateError), 2)
    engine.wake_up(["weights"])
    for level in (1, 2):
        message = refused(lambda level=level: engine.sleep(level), EngineStateError)  # type: ignore[misc]
        expect("kv_cache" in message, f"the message does not say what is asleep: {message}")
    engine.wake_up()
    subject.holds(0, "after moves that were refused")


@contract.check(408)
def check_caches_are_emptied_whenever_asked(subject: Subject) -> None:
    """`reset_caches` may be called awake, asleep, half awake and stale, any number of times, and changes no completion."""  # noqa: E501
    engine = subject.fresh()
    engine.reset_caches()
    subject.generate()
    engine.reset_caches()
    engine.reset_caches()
    subject.holds(0, "with empty caches")
    engine.sleep(1)
    engine.reset_caches()
    engine.wake_up(["weights"])
    engine.reset_caches()
    engine.wake_up()
    subject.holds(0, "after caches were emptied in its sleep")
    engine.sleep(2)
    engine.wake_up()
    engine.reset_caches()
    expect(engine.status is EngineStatus.STALE, f"it is {engine.status}, expected stale")


MOVES: Mapping[str, Callable[[Subject, RolloutEngine], object]] = {
    "generate": lambda subject, _: subject.generate(subject.prompts[:2], max_tokens=2),
    "sleep(1)": lambda _, engine: engine.sleep(1),
    "sleep(2)": lambda _, engine: engine.sleep(2),
    "wake_up()": lambda _, engine: engine.wake_up(),
    "wake_up(weights)": lambda _, engine: engine.wake_up(["weights"]),
    "wake_up(kv_cache)": lambda _, engine: engine.wake_up(["kv_cache"]),
    "update": lambda subject, engine: engine.update_weights(buckets_of(subject.weights(0)), engine.weight_version + 1),
    "update, broken": lambda subject, engine: engine.update_weights(
        buckets_of(dict(list(subject.weights(0).items())[:-1])), engine.weight_version + 1
    ),
    "reset_caches": lambda _, engine: engine.reset_caches(),
}
"""What is done with an engine; an update with buckets, as they come without ``weight_sync.send``."""


@dataclass
class _Table:
    """The states again, as slow as they can be written: what each move does, or the error that it should raise."""

    asleep: frozenset[str] = frozenset()
    level: int = 0
    stale: bool = False
    version: int = 0

    def move(self, name: str) -> str:
        """Make a move, and say what comes of it."""
        if name == "generate":
            return "EngineStateError" if self.asleep else "StaleWeightsError" if self.stale else "done"
        if name.startswith("sleep"):
            return self._sleep(int(name[6]))
        if name.startswith("wake_up"):
            self.asleep -= frozenset(TAGS) if name == "wake_up()" else {name[8:-1]}
        elif name.startswith("update"):
            if "weights" in self.asleep:
                return "EngineStateError"
            self.stale = "broken" in name
            self.version += not self.stale
            return "another error" if self.stale else "done"
        return "done"

    def _sleep(self, level: int) -> str:
        if self.asleep and (len(self.asleep) < len(TAGS) or level != self.level):
            return "EngineStateError"
        self.asleep, self.level = frozenset(TAGS), level
        self.stale = self.stale or level == 2
        return "done"

    @property
    def status(self) -> EngineStatus:
        """What the engine should say that it is."""
        awake = EngineStatus.STALE if self.stale else EngineStatus.AWAKE
        return EngineStatus.ASLEEP if self.asleep else awake


def _outcome(call: Callable[[], object]) -> str:
    """The kind of error that a call raises, as far as it is one of states."""
    try:
        call()
    except StaleWeightsError:
        return "StaleWeightsError"
    except EngineStateError:
        return "EngineStateError"
    except LightRFTError:
        return "another error"
    return "done"


@contract.check(409)
def check_every_move_from_every_state(subject: Subject) -> None:
    """In every order, each move is carried out or refused as the table of states in `docs/engines.md` says, and status, version and what is asleep are as there (F01, F02)."""  # noqa: E501
    for seed in range(4):
        engine = subject.fresh()
        table = _Table()
        first = engine.weight_version
        walk = random.Random(seed)
        moves: list[str] = []
        for _ in range(20):
            moves.append(walk.choice(sorted(MOVES)))
            did = _outcome(functools.partial(MOVES[moves[-1]], subject, engine))
            found = did, engine.status, engine.asleep, engine.weight_version - first
            wanted = table.move(moves[-1]), table.status, table.asleep, table.version
            if found != wanted:
                raise AssertionError(f"after {', '.join(moves)}: {found}, expected {wanted}")
