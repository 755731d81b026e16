"""Where in the caller's code something happened, for messages about calls that do not fit together."""

from __future__ import annotations

import sys

__all__ = ["call_site"]

_OWN = ("lightrft.strategy", "lightrft.sim.engine")


def call_site() -> str:
    """``file:line`` of the first caller outside strategies and engines."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_OWN):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
