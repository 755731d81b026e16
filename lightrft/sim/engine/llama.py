"""The forward pass of Llama and the models of its build, with few calls: most of a small model's time is their number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightrft.sim.engine.key_values import Pair

__all__ = ["Llama"]

_MODELS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
_ROPES = frozenset({"default", "linear", "llama3"})
"""Kinds of rotary embeddings that depend on the position alone."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer, each with its bias; some are fused."""

    before: Tensor
    inner: tuple[Tensor, Tensor | None]
    norms: tuple[Tensor, Tensor] | None
    outer: tuple[Tensor, Tensor | None]
    after: Tensor
    wide: tuple[Tensor, Tensor | None]
    narrow: tuple[Tensor, Tensor | None]


class Llama:
    """Computes what the model of transformers computes, in fewer calls. Its weights become views of fused ones.

    Args:
        module: of transformers, see ``fits``.
    """

    def __init__(self, module: Any) -> None:
        config = module.config
        self._module = module
        self._heads, self._shared = config.num_attention_heads, config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._eps = config.rms_norm_eps
        self._activation = module.model.layers[0].mlp.act_fn
        self._layers = [_fused(layer) for layer in module.model.layers]
        self._waves = torch.empty(0, 2, self._size, dtype=module.dtype)

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a model is of this build."""
        if type(module).__name__ not in _MODELS:
            return False
        return module.config.rope_parameters["rope_type"] in _ROPES

    def waves(self, positions: Tensor) -> Tensor:
        """Cosines and sines of rotary embeddings (Su et al., 2021), (B, Q, 2, size); the sines with the signs of halves."""
        longest = int(positions.max()) + 1
        if len(self._waves) < longest:
            every = torch.arange(max(longest, 2 * len(self._waves))).unsqueeze(0)
            cos, sin = self._module.model.rotary_emb(self._waves, every)
            half = self._size // 2
            self._waves = torch.stack([cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)], 1)
        return self._waves[positions]

    def __call__(self, x: Tensor, waves: Tensor, seen: Tensor, pairs: Sequence[Pair]) -> Tensor:
        """The logits (B, V) of the last of Q tokens; see ``Forward``."""
        batch, count, _ = x.shape
        cos, sin = waves.unsqueeze(3).unbind(2)
        for layer, (keys, values) in zip(self._layers, pairs, strict=True):
            y = functional.linear(self._norm(x, layer.before), *layer.inner).view(batch, count, -1, self._size)
            turned, plain = y.split([self._heads + self._shared, self._shared], 2)
            if layer.norms is not None:
                query, key = turned.split([self._heads, self._shared], 2)
                turned = torch.cat([self._norm(query, layer.norms[0]), self._norm(key, layer.norms[1])], 2)
            turned = (turned * cos).addcmul_(turned.roll(self._size // 2, -1), sin)
            query, key = turned.split([self._heads, self._shared], 2)
            keys.narrow(2, keys.shape[2] - count, count).copy_(key.transpose(1, 2))
            values.narrow(2, values.shape[2] - count, count).copy_(plain.transpose(1, 2))
            x = x + functional.linear(self._attended(query, keys, values, seen), *layer.outer)
            gate, up = functional.linear(self._norm(x, layer.after), *layer.wide).chunk(2, -1)
            x = x + functional.linear(self._activation(gate) * up, *layer.narrow)
        last = self._norm(x[:, -1], self._module.model.norm.weight)
        logits: Tensor = functional.linear(last, self._module.lm_head.weight)
        return logits

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight, self._eps)

    def _attended(self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        batch, count, heads, size = query.shape
        grouped = query.transpose(1, 2).reshape(batch, self._shared, -1, size)
        scores = (grouped * size**-0.5) @ keys.transpose(2, 3)
        scores.view(batch, self._shared, -1, count, scores.shape[-1]).add_(seen.unsqueeze(2))
        found = (scores.softmax(-1) @ values).view(batch, heads, count, size)
        return found.transpose(1, 2).reshape(batch, count, -1)


def _fused(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    norms = (attention.q_norm.weight, attention.k_norm.weight) if hasattr(attention, "q_norm") else None
    return _Layer(
        before=layer.input_layernorm.weight,
        inner=_joined([attention.q_proj, attention.k_proj, attention.v_proj]),
        norms=norms,
        outer=(attention.o_proj.weight, attention.o_proj.bias),
        after=layer.post_attention_layernorm.weight,
        wide=_joined([mlp.gate_proj, mlp.up_proj]),
        narrow=(mlp.down_proj.weight, mlp.down_proj.bias),
    )


def _joined(layers: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight and bias of several layers, which become views of it."""
    joined = []
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is None:
            joined.append(None)
            continue
        whole = torch.cat([part.detach() for part in parts])
        for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            part.data = view
        joined.append(whole)
    return joined[0], joined[1]
