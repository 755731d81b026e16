"""Weights of a model of transformers: as they were received, and as they are computed with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

__all__ = ["Weights"]


class Weights:
    """Holds weights in the precision of the engine, and brings them into what computes when it is used.

    So an update costs one copy, as it does in a real engine.

    Args:
        model: what computes, in single precision; its weights are arbitrary until they are put in.
        dtype: that the engine holds weights in; they are rounded to it.
        name_of: from a name of the model to that of the checkpoint.

    Attributes:
        held: by the names of a checkpoint; names that are tied have one tensor.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, name_of: Callable[[str], str] = str) -> None:
        self._model = model
        used: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._used = {name_of(name): tensor for name, tensor in used.items()}
        made: dict[int, Tensor] = {}
        self.held: Mapping[str, Tensor] = {
            name: made.setdefault(id(tensor), tensor.detach().to(dtype)) for name, tensor in self._used.items()
        }
        self._is_same = dtype == torch.float32
        self._changed: set[str] = set()
        self._exact: nn.Module | None = None
        self._exact_is_old = True

    def put(self, name: str, tensor: Tensor) -> None:
        """Copy one weight in."""
        with torch.no_grad():
            self.held[name].copy_(tensor)
        self._note(name)

    def drop(self) -> None:
        """Destroy all: they are NaN."""
        for name, tensor in self.held.items():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
                self._note(name)
        self.refresh()

    def _note(self, name: str) -> None:
        self._exact_is_old = True
        if not self._is_same:
            self._changed.add(name)

    def refresh(self) -> None:
        """Compute with what is held from now on."""
        with torch.no_grad():
            for name in self._changed:
                self._used[name].copy_(self.held[name])
        self._changed.clear()

    def exact(self) -> nn.Module:
        """The model in double precision, with what is held; the same object each time."""
        if self._exact is None:
            self._exact = copy.deepcopy(self._model).double()
        elif self._exact_is_old:
            self._exact.load_state_dict(self._model.state_dict())
        self._exact_is_old = False
        return self._exact
