"""Samples and experiences: what is generated, and what is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Experience", "Sample", "join_images", "padded"]

Images = Mapping[str, Tensor]
"""What a model takes beside tokens, for one sequence: images as its processor has made them."""

_WHOLE = ("sequences", "attention_mask")
"""What has an entry for the first token too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion of one prompt.

    Attributes:
        prompt: the prompt as text.
        response: the completion as text.
        label: what a reward may compare it with.
        index: of the prompt in its data set.
        prompt_token_ids: as the engine saw the prompt, image tokens expanded.
        output_token_ids: what was generated.
        engine_log_probs: of each of ``output_token_ids``.
        truncated: whether generation ended at the limit.
        weight_version: of the weights that generated it.
        images: for the model; empty for a prompt of text alone.
    """

    prompt: str
    response: str
    label: Any = None
    index: int = 0
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    engine_log_probs: tuple[float, ...] | None = None
    truncated: bool = False
    weight_version: int = 0
    images: Images = field(default_factory=dict)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and completion."""
        return self.prompt_token_ids + self.output_token_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A batch of sequences, padded at their ends. What is said of tokens has an entry for each but the first.

    Attributes:
        sequences: prompts and completions, shape (batch, length).
        attention_mask: 1 at tokens, 0 at padding, shape (batch, length).
        action_mask: true where ``sequences[:, 1:]`` was generated, shape (batch, length - 1).
        log_probs: of the policy that is being improved, before it is, shape (batch, length - 1).
        engine_log_probs: of the engine, shape (batch, length - 1).
        initial_log_probs: of the initial model, shape (batch, length - 1), or ``None`` without one.
        entropy: of the policy's distributions, shape (batch, length - 1), or ``None`` if nothing needs it.
        chosen: tokens that the policy is trained on, shape (batch, length - 1), or ``None`` for all generated ones.
        values: what the critic expected before each token, shape (batch, length - 1), or ``None`` without one.
        rewards: of each sequence, shape (batch,).
        advantages: shape (batch, length - 1).
        returns: what the critic learns, shape (batch, length - 1).
        images: for the model, one mapping for each sequence.
    """

    sequences: Tensor
    attention_mask: Tensor
    action_mask: Tensor
    log_probs: Tensor
    engine_log_probs: Tensor
    initial_log_probs: Tensor | None = None
    entropy: Tensor | None = None
    chosen: Tensor | None = None
    values: Tensor | None = None
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    images: tuple[Images, ...] = ()

    def __len__(self) -> int:
        return len(self.sequences)

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The sequences of several batches, one after the other; there is one at least."""
        length = max(part.sequences.shape[1] for part in parts)

        def one(name: str) -> Any:
            values = [getattr(part, name) for part in parts]
            if name == "images":
                return tuple(each for value in values for each in value)
            if any(value is None for value in values):
                return None
            if name == "rewards":
                return torch.cat(values)
            return torch.cat([_widened(value, length - (name not in _WHOLE)) for value in values])

        return cls(**{each.name: one(each.name) for each in dataclasses.fields(cls)})

    @property
    def has_images(self) -> bool:
        """Whether a sequence has some."""
        return any(self.images)

    def with_filler(self, filler: Self | None) -> Self:
        """The same with ``filler`` behind it, where there is one and no sequence has images."""
        return self if filler is None or self.has_images else type(self).joined([self, filler])

    def first(self, count: int) -> Self:
        """The first sequences."""

        def one(name: str) -> Any:
            value = getattr(self, name)
            return None if value is None else value[:count]

        return type(self)(**{each.name: one(each.name) for each in dataclasses.fields(self)})

    def row(self, place: int) -> Self:
        """The sequence at ``place``, a batch of one, without padding."""
        length = int(self.attention_mask[place].sum())

        def one(name: str) -> Any:
            value = getattr(self, name)
            if value is None:
                return None
            if name in ("images", "rewards"):
                return value[place : place + 1]
            return value[place : place + 1, : length - (name not in _WHOLE)]

        return type(self)(**{each.name: one(each.name) for each in dataclasses.fields(self)})

    @classmethod
    def placeholder(cls, device: torch.device | str = "cpu", rows: int = 1) -> Self:
        """Sequences of two tokens, none of them generated: what a rank passes on that has nothing left."""
        two = torch.zeros(rows, 2, dtype=torch.int64, device=device)
        one = torch.zeros(rows, 1, device=device)
        given: dict[str, Any] = {each.name: one for each in dataclasses.fields(cls)}
        given |= {
            "sequences": two,
            "attention_mask": two + 1,
            "action_mask": one.bool(),
            "chosen": one.bool(),
            "rewards": one[:, 0],
        }
        return cls(**{**given, "images": ({},) * rows})

    def to(self, device: torch.device | str) -> Self:
        """The same on ``device``."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device)
            if isinstance(value, tuple):
                return tuple({name: tensor.to(device) for name, tensor in one.items()} for one in value)
            return value

        return type(self)(**{each.name: moved(getattr(self, each.name)) for each in dataclasses.fields(self)})


def padded(rows: Sequence[Sequence[float]], length: int, dtype: torch.dtype) -> Tensor:
    """Rows of different lengths, zeros behind them: shape (rows, length)."""
    found = torch.zeros(len(rows), length, dtype=dtype)
    for place, row in enumerate(rows):
        found[place, : len(row)] = torch.tensor(row, dtype=dtype)
    return found


def join_images(images: Sequence[Images]) -> dict[str, Tensor]:
    """What a model takes for a batch: the tensors of its sequences, one after the other; empty without images."""
    names = dict.fromkeys(name for one in images for name in one)
    return {name: torch.cat([one[name] for one in images if name in one]) for name in names}


def _widened(tensor: Tensor, length: int) -> Tensor:
    """``tensor`` (batch, shorter) with zeros behind it: (batch, length)."""
    return functional.pad(tensor, (0, length - tensor.shape[1]))
