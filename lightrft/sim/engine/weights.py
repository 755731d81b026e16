"""Weights of a model of transformers: as they were received, and as they are computed with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

__all__ = ["Weights"]


class Weights:
    """Holds weights in the precision of the engine, and brings them into a model of double precision when it is used.

    So an update costs one copy, as it does in a real engine.

    Args:
        model: what computes; its weights are arbitrary until the first ``refresh``.
        dtype: that the engine holds weights in; they are rounded to it.

    Attributes:
        held: by the names of a checkpoint; names that are tied have one tensor.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._used: dict[str, Tensor] = model.state_dict(keep_vars=True)
        made: dict[int, Tensor] = {}
        self.held: Mapping[str, Tensor] = {
            name: made.setdefault(id(tensor), tensor.detach().to(dtype)) for name, tensor in self._used.items()
        }
        self._changed: set[str] = set()

    def put(self, name: str, tensor: Tensor) -> None:
        """Copy one weight in."""
        with torch.no_grad():
            self.held[name].copy_(tensor)
        self._changed.add(name)

    def drop(self) -> None:
        """Destroy all: they are NaN."""
        for name, tensor in self.held.items():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
                self._changed.add(name)
        self.refresh()

    def refresh(self) -> None:
        """Compute with what is held from now on."""
        with torch.no_grad():
            for name in self._changed:
                self._used[name].copy_(self.held[name])
        self._changed.clear()
