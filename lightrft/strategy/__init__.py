"""One interface over training backends and inference engines.

``get_strategy(args)`` gives the strategy that a trainer calls; ``StrategyConfig`` holds its settings. Importing this
package loads nothing else; each name loads what it needs when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.lazy import lazily

if TYPE_CHECKING:
    from lightrft.strategy.config import StrategyConfig as StrategyConfig
    from lightrft.strategy.engine import is_engine as is_engine
    from lightrft.strategy.fake_strategy import FakeStrategy as FakeStrategy
    from lightrft.strategy.strategy import get_strategy as get_strategy
    from lightrft.strategy.strategy import register_strategy as register_strategy
    from lightrft.strategy.strategy_base import StrategyBase as StrategyBase

__all__ = ["FakeStrategy", "StrategyBase", "StrategyConfig", "get_strategy", "is_engine", "register_strategy"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "FakeStrategy": ".fake_strategy",
        "StrategyBase": ".strategy_base",
        "StrategyConfig": ".config",
        "get_strategy": ".strategy",
        "is_engine": ".engine",
        "register_strategy": ".strategy",
    },
)
