"""``vllm.exceptions``."""

from __future__ import annotations

from typing import Any

__all__ = ["VLLMClientError", "VLLMError", "VLLMValidationError"]


class VLLMError(Exception):
    """Base of all of them."""


class VLLMClientError(VLLMError):
    """The caller's mistake."""


class VLLMValidationError(VLLMClientError):
    """A value that is not allowed.

    Args:
        message: what is wrong.
        parameter: its name.
        value: what was given.
    """

    def __init__(self, message: str, *, parameter: str | None = None, value: Any = None) -> None:
        super().__init__(message)
        self.parameter = parameter
        self.value = value


for _each in (VLLMError, VLLMClientError, VLLMValidationError):
    _each.__module__ = "vllm.exceptions"
