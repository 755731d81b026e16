"""Forward passes of a model of transformers over sequences whose keys and values are kept in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightrft.sim.engine.key_values import Pair

__all__ = ["Forward"]

_ATTENTION = "lightrft_kept_in_place"


class Forward:
    """Runs a causal language model of transformers whose layers all have full attention.

    A step of a small model is mostly the work of the interpreter, so that steps are traced and run without it. Weights
    are arguments of a trace: it stays good when they change.

    Args:
        model: of transformers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(_ATTENTION, _attention)
        model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]
        self._model = model
        self._weights = [
            (module, name, weight)
            for path, module in model.named_modules()
            for name, weight in module._parameters.items()
            if weight is not None and "visual" not in path.split(".")
        ]
        self._traced: dict[bool, Callable[..., Tensor]] = {}

    def __call__(self, embedded: Tensor, positions: Tensor, seen: Tensor, layers: list[Pair]) -> Tensor:
        """The logits (B, V) of the last of Q tokens of each of B sequences.

        Args:
            embedded: the tokens, (B, Q, H).
            positions: of the tokens, as the model wants them.
            seen: (B, 1, Q, K), 0 where a token sees another and -inf where not.
            layers: keys and values of each layer, (B, heads, K, size); the last Q of K are written here.
        """
        parts = [part for pair in layers for part in pair]
        arguments = (embedded, positions, seen, *parts, *(weight for *_, weight in self._weights))
        single = embedded.shape[1] == 1
        if single not in self._traced:
            self._traced[single] = self._trace(arguments)
        return self._traced[single](*arguments)

    def shapes(self, embedded: Tensor, positions: Tensor) -> list[tuple[int, int, int]]:
        """For each layer: heads of keys and values, sizes of a key and of a value; of one token, (1, 1, H)."""
        from transformers import DynamicCache

        layers = self._model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
        cache, slots = DynamicCache(), [_Probe() for _ in range(layers)]
        cache.layers = slots
        seen = torch.zeros(1, 1, 1, 1, dtype=embedded.dtype)
        self._model(
            inputs_embeds=embedded, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return [slot.shape for slot in slots]

    def _trace(self, arguments: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that are the same in every call
            traced: Callable[..., Tensor] = torch.jit.trace(self._run, arguments, check_trace=False)
        return traced

    def _run(self, embedded: Tensor, positions: Tensor, seen: Tensor, *rest: Tensor) -> Tensor:
        from transformers import DynamicCache

        count = len(rest) - len(self._weights)
        cache = DynamicCache()
        cache.layers = [_Slot(*pair) for pair in zip(rest[:count:2], rest[1:count:2], strict=True)]
        with self._with_weights(rest[count:]):
            output = self._model(
                inputs_embeds=embedded,
                attention_mask=seen,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = output.logits[:, -1]
        return logits

    @contextmanager
    def _with_weights(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """The model has ``weights`` in the place of its own, which a trace would take for constants."""
        try:
            for (module, name, _), weight in zip(self._weights, weights, strict=True):
                module._parameters[name] = weight  # type: ignore[assignment] # any tensor does for computing
            yield
        finally:
            for module, name, own in self._weights:
                module._parameters[name] = own


class _Probe:
    """The cache of one layer that takes note of what it is given."""

    is_sliding = False
    is_compileable = False
    is_initialized = True
    shape = (0, 0, 0)

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Pair:
        """Note shapes."""
        self.shape = (keys.shape[1], keys.shape[3], values.shape[3])
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens before the update; their positions are given, so that nothing depends on it."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As ``get_seq_length``: the mask is given."""
        return query_length, 0


class _Slot(_Probe):
    """The cache of one layer, as transformers uses it, in memory that is there already."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> Pair:
        """Write the keys and values of new tokens at the end of those that are there; all of them."""
        _last(self.keys, keys).copy_(keys)
        _last(self.values, values).copy_(values)
        return self.keys, self.values


def _last(held: Tensor, new: Tensor) -> Tensor:
    """The place of ``new`` in ``held``."""
    if new.shape[2] == 1:
        return held.narrow(2, -1, 1)
    return held.narrow(2, held.shape[2] - new.shape[2], new.shape[2])


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
    (B, 1, Q, K), and is added.
    """
    batch, heads, count, size = query.shape
    shared = key.shape[1]
    grouped = (query * scaling).reshape(batch, shared, -1, size)
    scores = grouped @ key.transpose(2, 3)
    if count == 1:
        weights = (scores + attention_mask).softmax(-1)
    else:
        apart = scores.view(batch, shared, heads // shared, count, -1)
        weights = (apart + attention_mask[:, None]).softmax(-1).view(scores.shape)
    found = (weights @ value).reshape(batch, heads, count, size)
    return found.transpose(1, 2), None
