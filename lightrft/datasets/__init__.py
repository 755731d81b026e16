"""Prompts for rollouts, read from files.

Importing this package loads nothing else; each name loads what it needs when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.lazy import lazily

if TYPE_CHECKING:
    from lightrft.datasets.prompt_dataset import PromptDataset as PromptDataset
    from lightrft.datasets.prompts import Prompt as Prompt
    from lightrft.datasets.prompts import PromptBatch as PromptBatch
    from lightrft.datasets.prompts import collate as collate

__all__ = ["Prompt", "PromptBatch", "PromptDataset", "collate"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "Prompt": ".prompts",
        "PromptBatch": ".prompts",
        "PromptDataset": ".prompt_dataset",
        "collate": ".prompts",
    },
)
