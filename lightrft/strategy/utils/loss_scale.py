"""Dynamic loss scaling for training in fp16."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LossScale"]


@dataclass(kw_only=True)
class LossScale:
    """The factor that keeps small gradients from vanishing in fp16.

    It is halved after a step whose gradient overflowed, and doubled after ``window`` steps in a row without
    (Micikevicius et al. 2018, arXiv 1710.03740, section 3.2).

    Attributes:
        scale: the factor on the loss.
        window: steps without overflow before it is doubled.
        smallest: it does not sink below.
        good_steps: steps since the last change.
    """

    scale: float = 2.0**16
    window: int = 1000
    smallest: float = 1.0
    good_steps: int = 0

    def update(self, *, overflow: bool) -> None:
        """Take note of one step; every rank passes the same."""
        if overflow:
            self.scale = max(self.scale / 2, self.smallest)
            self.good_steps = 0
            return
        self.good_steps += 1
        if self.good_steps == self.window:
            self.scale *= 2
            self.good_steps = 0
