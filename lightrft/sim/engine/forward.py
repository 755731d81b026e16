"""Forward passes of a model of transformers over sequences whose keys and values are kept in place."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightrft.sim.engine.key_values import Pair

__all__ = ["Forward", "General", "attended", "place"]

_ATTENTION = "lightrft_kept_in_place"

_OFTEN = 16
"""Calls after which it pays to trace."""


class Forward(ABC):
    """Computes logits, and keys and values on the way.

    Most of the time of a small model is that of the interpreter: what is called often is traced and runs without it.
    Weights are arguments of a trace, which stays good when they change.
    """

    def __init__(self) -> None:
        self._calls: Counter[bool] = Counter()
        self._traced: dict[bool, Callable[..., Tensor]] = {}

    def __call__(self, embedded: Tensor, positions: Tensor, seen: Tensor, layers: Sequence[Pair]) -> Tensor:
        """The logits (B, V) of the last of Q tokens of each of B sequences.

        Args:
            embedded: the tokens, (B, Q, H).
            positions: of the tokens, as the model wants them.
            seen: (B, 1, Q, K), 0 where a token sees another and -inf where not.
            layers: keys and values of each layer, (B, heads, K, size); the last Q of K are written here.
        """
        arguments = (embedded, self._places(positions), seen, *(part for pair in layers for part in pair))
        single = embedded.shape[1] == 1
        if single not in self._traced:
            self._calls[single] += 1
            if self._calls[single] < _OFTEN:
                return self._run(*arguments, *self._weights())
            self._traced[single] = self._trace((*arguments, *self._weights()))
        return self._traced[single](*arguments, *self._weights())

    def _trace(self, arguments: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that are the same in every call
            traced: Callable[..., Tensor] = torch.jit.trace(self._run, arguments, check_trace=False)
        return traced

    @abstractmethod
    def _weights(self) -> Sequence[Tensor]:
        """All weights, always in the same order."""

    def _places(self, positions: Tensor) -> Tensor:
        """What ``_run`` wants to know of positions."""
        return positions

    @abstractmethod
    def _run(self, embedded: Tensor, places: Tensor, seen: Tensor, *rest: Tensor) -> Tensor:
        """Compute; the rest are keys and values in turns, and then the weights."""


class General(Forward):
    """Runs any causal language model of transformers whose layers all have full attention.

    Args:
        model: of transformers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        from transformers import AttentionInterface

        super().__init__()
        AttentionInterface.register(_ATTENTION, _attention)
        parts = {"text_config": _ATTENTION} if hasattr(model.config, "text_config") else _ATTENTION
        model.set_attn_implementation(parts)  # type: ignore[operator]
        self._model = model
        self._places_of_weights = [
            (module, name, weight)
            for path, module in model.named_modules()
            for name, weight in module._parameters.items()
            if weight is not None and "visual" not in path.split(".")
        ]

    def shapes(self, embedded: Tensor, positions: Tensor) -> list[tuple[int, int, int]]:
        """For each layer: heads of keys and values, sizes of a key and of a value; of one token, (1, 1, H)."""
        from transformers import DynamicCache

        layers = self._model.config.get_text_config().num_hidden_layers  # type: ignore[operator, union-attr]
        slots = [_Probe() for _ in range(layers)]
        cache: Any = DynamicCache()
        cache.layers = slots
        seen = torch.zeros(1, 1, 1, 1, dtype=embedded.dtype)
        self._model(
            inputs_embeds=embedded, attention_mask=seen, position_ids=positions, past_key_values=cache, use_cache=True
        )
        return [slot.shape for slot in slots]

    def _weights(self) -> Sequence[Tensor]:
        return [weight for *_, weight in self._places_of_weights]

    def _run(self, embedded: Tensor, places: Tensor, seen: Tensor, *rest: Tensor) -> Tensor:
        from transformers import DynamicCache

        count = len(rest) - len(self._places_of_weights)
        cache: Any = DynamicCache()
        cache.layers = [_Slot(*pair) for pair in zip(rest[:count:2], rest[1:count:2], strict=True)]
        with self._with_weights(rest[count:]):
            output = self._model(
                inputs_embeds=embedded,
                attention_mask=seen,
                position_ids=places,
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
            for (module, name, _), weight in zip(self._places_of_weights, weights, strict=True):
                module._parameters[name] = weight  # any tensor does for computing
            yield
        finally:
            for module, name, own in self._places_of_weights:
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
        place(self.keys, keys).copy_(keys)
        place(self.values, values).copy_(values)
        return self.keys, self.values


def place(held: Tensor, new: Tensor) -> Tensor:
    """The place of ``new`` in ``held``: its end."""
    if new.shape[2] == 1:
        return held.narrow(2, -1, 1)
    return held.narrow(2, held.shape[2] - new.shape[2], new.shape[2])


def attended(query: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """What tokens take from those that they see, (B, Q, heads, size of a value).

    Heads share keys and values, which are read once and copied never.

    Args:
        query: (B, heads, Q, size of a key).
        keys: (B, shared, K, size of a key).
        values: (B, shared, K, size of a value).
        seen: (B, 1, Q, K), which is added to the scores.
        scaling: of the scores.
    """
    count, shared = query.shape[2], keys.shape[1]
    grouped = (query * scaling).reshape(query.shape[0], shared, -1, query.shape[3])
    scores = grouped @ keys.transpose(2, 3)
    if count == 1:
        scores += seen
    else:
        scores.unflatten(2, (-1, count)).add_(seen.unsqueeze(2))
    found: Tensor = scores.softmax(-1) @ values
    if count == 1:
        return found.flatten(1, 2).unsqueeze(1)
    apart: Tensor = found.unflatten(2, (-1, count))
    return apart.flatten(1, 2).transpose(1, 2)


def _attention(
    module: torch.nn.Module,  # noqa: ARG001 - the interface of transformers
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """``attended``, as transformers calls it."""
    return attended(query, key, value, attention_mask, scaling), None
