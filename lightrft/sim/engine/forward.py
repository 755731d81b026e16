"""Forward passes of a model of transformers over a batch whose keys and values are kept in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightrft.sim.engine.key_values import KeyValues, Pair, left_padded

__all__ = ["Forward"]

_ATTENTION = "lightrft_kept_in_place"


class Forward:
    """Runs a causal language model of transformers whose layers all have full attention.

    One step of a small model is mostly the work of the interpreter, so that steps are traced and run without it.
    Weights with equal values are one in a trace: ``forget`` has to be called when they change.

    Args:
        model: of transformers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attention)
        model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]
        self._model = model
        self._layers = model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
        self._traced: Callable[..., Tensor] | None = None

    def forget(self) -> None:
        """The weights are others now."""
        self._traced = None

    def prompts(self, prompts: Sequence[tuple[int, ...]], room: int) -> tuple[KeyValues, Tensor]:
        """Keys, values and the logits of the last token, (B, V), of new sequences.

        Args:
            prompts: B of them.
            room: tokens that each sequence may have in the end, padding included.
        """
        lengths = [len(tokens) for tokens in prompts]
        width = max(lengths)
        mask = left_padded(lengths, width, room)
        ids = torch.tensor([[0] * (width - len(tokens)) + list(tokens) for tokens in prompts])
        causal = torch.ones(width, width, dtype=torch.bool).tril()
        shown = mask[:, None, None, :width] & causal
        shown |= torch.eye(width, dtype=torch.bool)  # padding sees itself, so that nothing is NaN
        slots = [_Slot(room=room) for _ in range(self._layers)]
        positions = (mask[:, :width].cumsum(1) - 1).clamp(min=0)
        logits = self._run(ids, positions, shown, slots)
        return KeyValues([(slot.keys, slot.values) for slot in slots], mask, width), logits

    def step(self, held: KeyValues, tokens: Tensor) -> Tensor:
        """The logits (B, V) after one token more of each sequence, (B,), which is added to ``held``."""
        held.mask[:, held.length] = True
        held.length += 1
        mask = held.mask[:, : held.length]
        arguments = (
            tokens.unsqueeze(1),
            mask.sum(1, keepdim=True) - 1,
            mask[:, None, None, :],
            *(part for pair in held.layers for part in pair),
        )
        if self._traced is None:
            self._traced = self._trace(arguments)
        return self._traced(*arguments)

    def _trace(self, arguments: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that are the same in every call
            traced: Callable[..., Tensor] = torch.jit.trace(self._step, arguments, check_trace=False)
        return traced

    def _step(self, ids: Tensor, positions: Tensor, shown: Tensor, *parts: Tensor) -> Tensor:
        pairs = list(zip(parts[::2], parts[1::2], strict=True))
        return self._run(ids, positions, shown, [_Slot(pair, shown.shape[-1]) for pair in pairs])

    def _run(self, ids: Tensor, positions: Tensor, shown: Tensor, slots: list[Any]) -> Tensor:
        from transformers import DynamicCache

        cache = DynamicCache()
        cache.layers = slots
        output = self._model(
            input_ids=ids,
            attention_mask=shown,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class _Slot:
    """The cache of one layer, as transformers uses it, in memory that is there already.

    Args:
        pair: keys and values with room for more; made at first if ``None``.
        length: tokens that there are after the update.
        room: of memory that is made.
    """

    is_sliding = False
    is_compileable = False
    is_initialized = True

    def __init__(self, pair: Pair | None = None, length: int = 0, room: int = 0) -> None:
        self._length, self._room = length, room
        if pair is not None:
            self.keys, self.values = pair

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Pair:
        """Write the keys and values of new tokens behind those that are there; all of them."""
        if self._room:
            batch, heads, self._length, size = keys.shape
            self.keys = keys.new_zeros(batch, heads, self._room, size)
            self.values = values.new_zeros(batch, heads, self._room, values.shape[-1])
        first = self._length - keys.shape[-2]
        self.keys[:, :, first : self._length] = keys
        self.values[:, :, first : self._length] = values
        return self.keys[:, :, : self._length], self.values[:, :, : self._length]

    def get_seq_length(self) -> int:
        """Tokens before the update; their positions are given, so that nothing depends on it."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As ``get_seq_length``: the mask is given."""
        return query_length, 0


def _attention(
    module: torch.nn.Module,  # noqa: ARG001 - the interface of transformers
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention to keys and values that heads share, which are read once and copied never.

    ``query`` is (B, heads, Q, size of a head); ``key`` and ``value`` have fewer heads, and K tokens; the mask is
    (B, 1, Q, K), true where a query sees a key.
    """
    batch, heads, count, size = query.shape
    shared = key.shape[1]
    grouped = query.reshape(batch, shared, heads // shared, count, size)
    scores = (grouped * scaling).reshape(batch, shared, -1, size) @ key.transpose(2, 3)
    scores = scores.view(batch, shared, heads // shared, count, -1).masked_fill(~attention_mask[:, None], float("-inf"))
    weights = scores.softmax(-1).view(batch, shared, -1, key.shape[2])
    found = (weights @ value).reshape(batch, heads, count, size)
    return found.transpose(1, 2), None
