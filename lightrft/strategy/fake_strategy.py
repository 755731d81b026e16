"""The documented path of FakeStrategy, which lives in the simulator: importing this module loads nothing of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.sim.strategy import FakeStrategy, get_fake_strategy

__all__ = ["FakeStrategy", "get_fake_strategy"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from lightrft.sim import strategy

        return getattr(strategy, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
