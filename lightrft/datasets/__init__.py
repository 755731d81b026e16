"""Prompts for rollouts, read from files.

Importing this package loads nothing else; each name loads what it needs when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.datasets.prompt_dataset import PromptDataset as PromptDataset
    from lightrft.datasets.prompts import Prompt as Prompt
    from lightrft.datasets.prompts import PromptBatch as PromptBatch
    from lightrft.datasets.prompts import collate as collate

__all__ = ["Prompt", "PromptBatch", "PromptDataset", "collate"]

_HOMES = {
    "Prompt": "prompts",
    "PromptBatch": "prompts",
    "PromptDataset": "prompt_dataset",
    "collate": "prompts",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
