"""Dynamic loss scaling for fp16."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LossScale"]


@dataclass(slots=True)
class LossScale:
    """What a loss is multiplied with, so that small gradients do not vanish in fp16.

    Halved when gradients overflow, doubled after ``growth_interval`` steps without overflow (Micikevicius et al.,
    "Mixed Precision Training", arXiv:1710.03740, section 3.2). It follows the global gradient norm, so it is the same
    on every rank.

    Attributes:
        value: the factor.
        good_steps: steps since it last changed.
        growth_interval: steps without overflow after which it is doubled.
    """

    value: float = 2.0**16
    good_steps: int = 0
    growth_interval: int = 2000

    def update(self, *, overflowed: bool) -> None:
        """Take note of how a step went."""
        if overflowed:
            self.value = max(1.0, self.value / 2)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.value *= 2
            self.good_steps = 0
