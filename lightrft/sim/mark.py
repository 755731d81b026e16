"""What ``@pytest.mark.sim(...)`` says: sizes, seeds, and the worlds to run in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightrft.errors import ConfigError

__all__ = ["PROCESS_OPTIONS", "SIGNATURE", "WORLD_OPTIONS", "SimMark"]

WORLD_OPTIONS = (
    "gpus_per_node",
    "schedule",
    "numerics",
    "profile",
    "rank_local",
    "cuda",
    "engines",
    "strict",
    "check_determinism",
    "stall_after",
    "stall_limit",
)
"""Keyword arguments that go to ``SimWorld`` as they are."""

PROCESS_OPTIONS = ("backend", "gpus_per_node", "limit", "tagged")
"""Keyword arguments that go to ``ProcessWorld`` as they are."""

_OPTIONS = {"sim": WORLD_OPTIONS, "process": PROCESS_OPTIONS}
_ALL_OPTIONS = tuple(dict.fromkeys((*WORLD_OPTIONS, *PROCESS_OPTIONS)))
_ALLOWED = ("ranks", "seeds", "world", *_ALL_OPTIONS)

SIGNATURE = f"sim(ranks, *, seeds=1, world='sim', {', '.join(f'{name}=...' for name in _ALL_OPTIONS)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class SimMark:
    """The checked arguments of the mark.

    Attributes:
        sizes: numbers of ranks; more than one makes one test for each.
        each_size: whether a list of sizes was given, so that the size belongs into the name of the test.
        seeds: seeds to run, in order.
        worlds: ``sim`` (simulated ranks), ``process`` (real processes), or both; both make one test for each.
        each_world: whether a list of worlds was given, so that the world belongs into the name of the test.
        options: further keyword arguments, by world.
    """

    sizes: tuple[int, ...]
    each_size: bool
    seeds: tuple[int, ...]
    worlds: tuple[str, ...]
    each_world: bool
    options: Mapping[str, Mapping[str, Any]]

    @classmethod
    def of(cls, marks: Iterable[Any]) -> SimMark:
        """Join the marks of a test, its class and its module, the closest one first: it has the last word.

        Raises:
            ConfigError: an argument is unknown, missing, or cannot work.
        """
        given: dict[str, Any] = {}
        for mark in reversed(list(marks)):
            if len(mark.args) > 1:
                raise ConfigError(f"{mark.args!r}: expected one positional argument, the number of ranks")
            given |= {"ranks": mark.args[0]} if mark.args else {}
            given |= mark.kwargs
        unknown = [name for name in given if name not in _ALLOWED]
        if unknown:
            raise ConfigError(f"unknown argument {unknown[0]!r}: expected one of {', '.join(_ALLOWED)}")
        if "ranks" not in given:
            raise ConfigError("the number of ranks is missing: write @pytest.mark.sim(ranks=8)")
        return cls._checked(given)

    @classmethod
    def _checked(cls, given: dict[str, Any]) -> SimMark:
        ranks, seeds = given["ranks"], given.get("seeds", 1)
        each_size = _is_list(ranks)
        sizes = tuple(ranks) if each_size else (ranks,)
        if not sizes or not all(_is_int(size) and size >= 1 for size in sizes):
            raise ConfigError(f"ranks={ranks!r}: expected a number of at least 1, or a list of such numbers")
        drawn = tuple(seeds) if _is_list(seeds) else tuple(range(seeds)) if _is_int(seeds) else ()
        if not drawn or not all(map(_is_int, drawn)):
            raise ConfigError(f"seeds={seeds!r}: expected how many seeds to run, at least 1, or a list of seeds")
        world = given.get("world", "sim")
        each_world = _is_list(world)
        worlds = tuple(world) if each_world else (world,)
        options = _options(world, worlds, given)
        if "sim" in options and (_is_list(seeds) or seeds > 1):
            options["sim"].setdefault("schedule", "random")
        return cls(sizes=sizes, each_size=each_size, seeds=drawn, worlds=worlds, each_world=each_world, options=options)


def _options(world: Any, worlds: tuple[Any, ...], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The options of each world; one that no world of the test takes is an error."""
    if not worlds or any(name not in _OPTIONS for name in worlds):
        raise ConfigError(f"world={world!r}: expected 'sim', 'process', or a list of both")
    options = {name: {key: given[key] for key in _OPTIONS[name] if key in given} for name in worlds}
    for key in _ALL_OPTIONS:
        if key in given and not any(key in taken for taken in options.values()):
            only = "simulated ranks (world='sim')" if key in WORLD_OPTIONS else "real processes (world='process')"
            raise ConfigError(f"{key} is for {only} only, and this test has world={world!r}: leave it out")
    return options


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
