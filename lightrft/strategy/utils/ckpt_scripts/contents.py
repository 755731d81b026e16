"""What a checkpoint holds, whatever wrote it: tensors by the name of their parameter, and an optimizer's settings."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["IMPLEMENTATION", "WEIGHT", "Contents", "Place", "Spec", "View", "settings_of"]

WEIGHT = ""
"""The key of a weight, or of a buffer."""

IMPLEMENTATION = ("params", "decays", "foreach", "fused", "capturable", "differentiable", "bias_correction", "step")
"""What optimizers keep in a parameter group that is no hyper-parameter."""


class Place(NamedTuple):
    """Which tensor: of which parameter or buffer, and ``WEIGHT`` or the key of a state of the optimizer."""

    name: str
    key: str = WEIGHT

    def __str__(self) -> str:
        return f"{self.key} of {self.name}" if self.key else self.name


@dataclass(frozen=True, slots=True)
class Spec:
    """A tensor that is not read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spec:
        """That of ``tensor``."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def numel(self) -> int:
        """How many elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """How many bytes."""
        return self.numel * self.dtype.itemsize


class Contents(ABC):
    """The tensors of a checkpoint, each read when it is asked for.

    Attributes:
        specs: every tensor there is. A tied parameter is there once.
        groups: of the optimizer: hyper-parameters, and ``params``, the names of what it trains; ``None`` without one.
        loss_scale: of fp16: value, and steps since it changed; ``None`` without one.
    """

    specs: Mapping[Place, Spec]
    groups: list[dict[str, Any]] | None = None
    loss_scale: tuple[float, int] | None = None

    @abstractmethod
    def read(self, place: Place) -> torch.Tensor:
        """A tensor, on the CPU; not to be written into.

        Raises:
            CheckpointError: the file that holds it is damaged.
        """

    @property
    def trained(self) -> list[str]:
        """Names of what the optimizer trains, group by group."""
        return [name for group in self.groups or [] for name in group["params"]]


class View(Contents):
    """Other contents, of which weights alone are seen, under other names or in another dtype.

    Args:
        contents: what is seen.
        names: of weights: where each is seen, by its name there; ``None`` for all, as they are.
        dtype: of floating-point weights; ``None`` for that which they have.
    """

    def __init__(
        self, contents: Contents, *, names: Mapping[str, str] | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._contents = contents
        weights = [place.name for place in contents.specs if place.key == WEIGHT]
        seen = {name: name for name in weights} if names is None else names
        self._places = {Place(name): Place(there) for there, name in seen.items()}
        self._dtype = dtype
        self.specs = {here: self._cast(contents.specs[there]) for here, there in self._places.items()}

    def _cast(self, spec: Spec) -> Spec:
        casts = self._dtype is not None and spec.dtype.is_floating_point
        return Spec(spec.shape, self._dtype) if casts and self._dtype is not None else spec

    def read(self, place: Place) -> torch.Tensor:
        """As in ``Contents``."""
        return self._contents.read(self._places[place]).to(self.specs[place].dtype)


def settings_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a parameter group."""
    return {
        key: value.item() if isinstance(value, torch.Tensor) and not value.dim() else value
        for key, value in group.items()
        if key not in IMPLEMENTATION
    }
