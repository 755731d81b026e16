"""What checks of several contracts say of what they found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from lightrft.errors import LightRFTError

__all__ = ["expect", "refused"]


def expect(fact: object, message: str) -> None:
    """Something is so.

    Raises:
        AssertionError: it is not; with ``message``.
    """
    if not fact:
        raise AssertionError(message)


def refused(call: Callable[[], Any], *kinds: type[LightRFTError]) -> str:
    """The message with which ``call`` is refused, by an error of one of ``kinds``.

    Raises:
        AssertionError: it is not refused.
    """
    try:
        result = call()
    except kinds as error:
        return str(error)
    raise AssertionError(f"expected {' or '.join(kind.__name__ for kind in kinds)}, and it returned {result!r:.300}")
