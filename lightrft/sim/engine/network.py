"""A model of transformers, as far as decoding needs it: embedded tokens, positions, forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightrft.sim.engine.forward import Forward, General
from lightrft.sim.engine.key_values import KeyValues, Pair
from lightrft.sim.engine.llama import Llama
from lightrft.sim.engine.vision import Features

if TYPE_CHECKING:
    from lightrft.sim.engine.samples import Medium

__all__ = ["Network"]


class Network:
    """Forward passes of a causal language model of transformers.

    Args:
        module: the model.
        remembers: whether what the vision encoder made of an image is remembered.
    """

    def __init__(self, module: Any, *, remembers: bool = False) -> None:
        self._module = module
        self._embeddings = module.get_input_embeddings()
        self.features = Features(module, remembers=remembers)
        self._general = General(module)
        self._forward: Forward = Llama(module) if Llama.fits(module) else self._general
        self._axes = 3 if hasattr(getattr(module, "model", None), "get_rope_index") else 0
        self._shapes: list[tuple[int, int, int]] = []

    def embedded(self, ids: Tensor) -> Tensor:
        """Tokens (B, Q) as vectors, (B, Q, H)."""
        found: Tensor = self._embeddings(ids)
        return found

    def __call__(self, embedded: Tensor, positions: Tensor, seen: Tensor, layers: list[Pair]) -> Tensor:
        """See ``Forward``; positions are (B, Q), or (axes, B, Q) for a model that has several axes."""
        if self._axes and positions.dim() == 2:
            positions = positions.expand(self._axes, -1, -1)
        return self._forward(embedded, positions, seen, layers)

    def step(self, held: KeyValues, tokens: Tensor) -> Tensor:
        """The logits (B, V) after one token more of each sequence, (B,), which is added to ``held``."""
        held.length += 1
        seen = held.mask[..., : held.length]
        return self(self.embedded(tokens.unsqueeze(1)), held.shift + (held.length - 1), seen, held.part(None, 0))

    def room_for(self, lengths: Sequence[int], more: int) -> KeyValues:
        """Room for sequences of these lengths, and as many tokens more."""
        if not self._shapes:
            embedded = self.embedded(torch.zeros(1, 1, dtype=torch.int64))
            positions = torch.zeros((self._axes, 1, 1) if self._axes else (1, 1), dtype=torch.int64)
            self._shapes = self._general.shapes(embedded, positions)
        return KeyValues.empty(self._shapes, lengths, max(lengths) + more, self._module.dtype)

    def seeing(self, tokens: tuple[int, ...], media: tuple[Medium, ...]) -> tuple[Tensor, Tensor, int]:
        """A prompt with images: its tokens as vectors, (1, Q, H), their positions, and what shifts later ones."""
        ids = torch.tensor([tokens])
        return self.features.placed(ids, self.embedded(ids), media)
