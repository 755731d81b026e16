"""One prompt, and several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from lightrft.errors import ConfigError

__all__ = ["Prompt", "PromptBatch", "collate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a completion is generated for, and what its reward is computed from.

    Attributes:
        prompt: text, as the tokenizer gets it: with the chat template, if there is one.
        token_ids: the same as token ids, without padding; one image token for each image.
        label: of the record; ``None`` if it has none.
        images: in the order of their places in the prompt.
        index: of the record in what was read, counted from 0; records that were left out are counted too.
    """

    prompt: str
    token_ids: tuple[int, ...]
    label: Any = None
    images: tuple[Any, ...] = ()
    index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptBatch:
    """Several prompts; entry ``i`` of every field is of the same one.

    The fields go into ``strategy.gather_and_generate`` as they are.

    Attributes:
        prompts: texts.
        token_ids: one tuple of token ids for each prompt.
        labels: one for each prompt, or ``None``.
        images: one tuple of images for each prompt.
        indices: of the records.
    """

    prompts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    labels: tuple[Any, ...]
    images: tuple[tuple[Any, ...], ...]
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def repeated(self, times: int) -> Self:
        """Each prompt ``times`` times in a row, as completions come if each is sampled so often.

        Raises:
            ConfigError: ``times`` is below 1.
        """
        if times < 1:
            raise ConfigError(f"a prompt is repeated {times} times: expected 1 at least")
        order = [place for place in range(len(self)) for _ in range(times)]
        each = {one.name: getattr(self, one.name) for one in fields(self)}
        return type(self)(**{name: tuple(several[place] for place in order) for name, several in each.items()})


def collate(prompts: Sequence[Prompt]) -> PromptBatch:
    """A batch of prompts, in their order; for ``strategy.setup_dataloader(..., collate_fn=collate)``."""
    return PromptBatch(
        prompts=tuple(one.prompt for one in prompts),
        token_ids=tuple(one.token_ids for one in prompts),
        labels=tuple(one.label for one in prompts),
        images=tuple(one.images for one in prompts),
        indices=tuple(one.index for one in prompts),
    )
