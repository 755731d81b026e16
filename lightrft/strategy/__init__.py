"""One interface over training backends and inference engines.

``get_strategy(args)`` gives the strategy that a trainer calls; ``StrategyConfig`` holds its settings. Importing this
package loads nothing else; each name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.strategy.config import StrategyConfig as StrategyConfig
    from lightrft.strategy.engine import is_engine as is_engine
    from lightrft.strategy.fake_strategy import FakeStrategy as FakeStrategy
    from lightrft.strategy.strategy import get_strategy as get_strategy
    from lightrft.strategy.strategy import register_strategy as register_strategy
    from lightrft.strategy.strategy_base import StrategyBase as StrategyBase

__all__ = ["FakeStrategy", "StrategyBase", "StrategyConfig", "get_strategy", "is_engine", "register_strategy"]

_HOMES = {
    "FakeStrategy": "fake_strategy",
    "StrategyBase": "strategy_base",
    "StrategyConfig": "config",
    "get_strategy": "strategy",
    "is_engine": "engine",
    "register_strategy": "strategy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
