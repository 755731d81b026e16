"""Loggers of which every rank has its own settings: level, handlers, filters, ``propagate``, ``disabled``.

A logger that some rank changes gets one set of attributes for each rank from then on; a switch costs nothing for all
others. What a module does to loggers while it is imported is done once in a process, and so holds for every rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from lightrft.sim.current import current_task
from lightrft.sim.patching import Patch

__all__ = ["RankLoggers", "patches"]

Attributes = dict[str, Any]

_TREE = frozenset({"parent", "manager", "name"})
"""Attributes that belong to the tree of loggers, which all ranks share."""


class RankLoggers:
    """The loggers that ranks have changed. The root is always one of them."""

    def __init__(self) -> None:
        self._loggers: list[logging.Logger] = [logging.root]
        self._index = {id(logging.root): 0}
        self.originals: list[Attributes] = [vars(logging.root)]
        self._templates = [_copy(self.originals[0])]
        self._sets: list[list[Attributes]] = []
        self._loaded: list[Attributes] = self.originals

    def load(self, attributes: list[Attributes]) -> None:
        """Give the changed loggers the attributes that one rank has set; of those new to it, it gets copies."""
        if len(attributes) < len(self._loggers):
            if not attributes:  # a rank that begins
                self._sets.append(attributes)
            attributes += map(_copy, self._templates[len(attributes) :])
        self._loaded = attributes
        for logger, values in zip(self._loggers, attributes, strict=True):
            _put(logger, values)

    def change(self, logger: logging.Logger, operation: Callable[[], Any], *, everywhere: bool) -> Any:
        """Let ``operation`` change ``logger``, for the running rank or for all."""
        position = self._index.get(id(logger))
        if everywhere:
            return operation() if position is None else self._change_all(position, operation)
        if position is None:
            self._adopt(logger)
        return operation()

    def _adopt(self, logger: logging.Logger) -> None:
        self._index[id(logger)] = len(self._loggers)
        self._loggers.append(logger)
        self.originals.append(vars(logger))
        self._templates.append(_copy(vars(logger)))
        self._loaded.append(_copy(vars(logger)))
        _put(logger, self._loaded[-1])

    def _change_all(self, position: int, operation: Callable[[], Any]) -> Any:
        logger = self._loggers[position]
        mine = vars(logger)
        others = [self._templates, *self._sets]
        if logger is not logging.root:  # a module stays imported, and so its loggers stay as it has set them
            others.append(self.originals)
        for values in others:
            if position < len(values) and values[position] is not mine:
                _put(logger, values[position])
                operation()
        _put(logger, mine)
        return operation()


def _copy(attributes: Attributes) -> Attributes:
    handlers, filters = list(attributes["handlers"]), list(attributes["filters"])
    return {**attributes, "handlers": handlers, "filters": filters, "_cache": {}}


def _put(logger: logging.Logger, attributes: Attributes) -> None:
    object.__setattr__(logger, "__dict__", attributes)


def _change(logger: logging.Logger, operation: Callable[[], Any], *, of_tree: bool = False) -> Any:
    task = current_task()
    if task is None or "_cache" not in vars(logger):  # the second: it is just being made
        return operation()
    world = task.rank.world
    everywhere = of_tree or world.shared.is_importing(task)
    return world.switcher.loggers.change(logger, operation, everywhere=everywhere)


def _changing(method: Any) -> Callable[[Any], Any]:
    def make(_: Any) -> Any:
        def change(self: logging.Logger, argument: Any) -> Any:
            return _change(self, lambda: method(self, argument))

        change.__name__ = method.__name__
        return change

    return make


def _set_attribute(_: Any) -> Any:
    def set_attribute(self: logging.Logger, name: str, value: Any) -> None:
        _change(self, lambda: object.__setattr__(self, name, value), of_tree=name in _TREE)

    return set_attribute


def _is_enabled_for(_: Any) -> Any:
    """Without the cache, which would hold what another rank's levels allow."""

    def is_enabled_for(self: logging.Logger, level: int) -> bool:
        return not self.disabled and self.manager.disable < level and level >= self.getEffectiveLevel()

    return is_enabled_for


def _patches() -> list[Patch]:
    names = ("addHandler", "removeHandler", "addFilter", "removeFilter")
    return [
        *(Patch(logging.Logger, name, _changing(getattr(logging.Logger, name))) for name in names),
        Patch(logging.Logger, "__setattr__", _set_attribute),
        Patch(logging.Logger, "isEnabledFor", _is_enabled_for),
    ]


_PATCHES = _patches()


def patches() -> list[Patch]:
    """What tells that a logger is changed."""
    return _PATCHES
