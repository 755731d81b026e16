"""What a model itself says about completions: slow, and without anything of an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["entropy_of", "greedy", "is_tied", "log_probs", "next_token"]


@torch.no_grad()
def next_token(model: nn.Module, prompt: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Log-probs of every token after ``prompt``, (vocabulary,), on the CPU."""
    logits = model(torch.tensor([list(prompt)], device=_device(model))).logits[0, -1]
    return torch.log_softmax(logits.double().cpu() / temperature, -1)


@torch.no_grad()
def log_probs(model: nn.Module, prompt: Sequence[int], output: Sequence[int], temperature: float = 1.0) -> Tensor:
    """Of each token of ``output`` after ``prompt``, in float32 on the CPU."""
    ids = torch.tensor([[*prompt, *output]], device=_device(model))
    logits = model(ids).logits[0, len(prompt) - 1 : -1].double().cpu() / temperature
    return torch.log_softmax(logits, -1)[range(len(output)), list(output)].float()


def greedy(model: nn.Module, prompt: Sequence[int], count: int) -> list[int]:
    """The ``count`` likeliest tokens, one after the other."""
    found: list[int] = []
    while len(found) < count:
        found.append(int(next_token(model, [*prompt, *found]).argmax()))
    return found


def is_tied(model: nn.Module, prompt: Sequence[int], tokens: Sequence[int], within: float) -> bool:
    """Whether at some place of ``tokens`` another one is as likely, so that rounding of ``within`` decides."""
    best = [next_token(model, [*prompt, *tokens[:place]]).topk(2).values for place in range(len(tokens))]
    return any(float(first - second) < 10 * within for first, second in best)


def entropy_of(distribution: Tensor) -> tuple[float, float]:
    """Mean of the log-prob of a token that is drawn, and its standard deviation, from log-probs (vocabulary,)."""
    probs = distribution.exp()
    mean = (probs * distribution).sum()
    return float(mean), float((probs * (distribution - mean).square()).sum().sqrt())


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
