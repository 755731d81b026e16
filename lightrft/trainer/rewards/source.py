"""The contract of what gives rewards."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightrft.errors import RewardError
from lightrft.trainer.experience import Sample

__all__ = ["RewardSource", "Rewards", "Scored", "scores_of"]

Scored = Sequence[Sample]
"""What rewards are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """What a source gives for a number of samples.

    Attributes:
        rewards: of each sample, shape (samples,), float32.
        metrics: further numbers, shape (samples,) each: components of a mixture, or the accuracy.
    """

    rewards: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


class RewardSource(ABC):
    """Gives a reward for each sample."""

    name: str = "reward"
    """By which its part of a mixture is reported."""

    is_collective: bool = False
    """Whether all ranks have to ask at the same time, those without samples too."""

    @abstractmethod
    def __call__(self, samples: Scored) -> Rewards:
        """The rewards of ``samples``, in their order; any number, none included.

        Raises:
            RewardError: there are none to be had.
        """


def scores_of(answer: Any, count: int, who: str) -> Rewards:
    """Rewards of what a function or a service has answered.

    Args:
        answer: a number for each sample, in a sequence or a tensor; or a mapping with such under ``reward`` (or
            ``rewards``), and under other names what is to be reported.
        count: of samples.
        who: has answered, for messages.

    Raises:
        RewardError: it is something else.
    """
    if not isinstance(answer, Mapping):
        return Rewards(rewards=_numbers(answer, count, who))
    name = "rewards" if "rewards" in answer else "reward"
    if name not in answer:
        raise RewardError(
            f"{who} returned a mapping with {', '.join(map(str, answer)) or 'nothing'}: expected an entry 'reward' "
            "with a number for each sample"
        )
    more = {str(key): _numbers(value, count, f"{who}, {key!r}") for key, value in answer.items() if key != name}
    return Rewards(rewards=_numbers(answer[name], count, who), metrics=more)


def _numbers(answer: Any, count: int, who: str) -> Tensor:
    expected = f"expected a number for each of {count} samples"
    if isinstance(answer, Tensor):
        answer = answer.detach().cpu().tolist()
    if isinstance(answer, (str, bytes)) or not isinstance(answer, Sequence):
        answer = answer.tolist() if hasattr(answer, "tolist") else answer
    if isinstance(answer, (str, bytes)) or not isinstance(answer, Sequence):
        raise RewardError(f"{who} returned {type(answer).__name__} {answer!r:.100}: {expected}")
    if len(answer) != count:
        raise RewardError(f"{who} returned {len(answer)} rewards: {expected}")
    found = []
    for place, value in enumerate(answer):
        try:
            found.append(float(value))
        except (TypeError, ValueError):
            raise RewardError(f"{who} returned {value!r:.100} for sample {place}: {expected}") from None
        if math.isnan(found[-1]):
            raise RewardError(f"{who} returned NaN for sample {place}: {expected}")
    return torch.tensor(found, dtype=torch.float32)
