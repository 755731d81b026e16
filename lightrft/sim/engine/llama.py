"""The forward pass of Llama and the models of its build, in few calls: their number is what a small model costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightrft.sim.engine.forward import Forward, attended, place

if TYPE_CHECKING:
    from lightrft.sim.engine.key_values import Pair

__all__ = ["Llama"]

_MODELS = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
_ROPES = frozenset({"default", "linear", "llama3"})
"""Kinds of rotary embeddings that depend on the position alone."""


class Llama(Forward):
    """Computes what the model of transformers computes, in fewer calls. Its weights become views of fused ones.

    Args:
        module: of transformers, see ``fits``.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        config = module.config
        self._rotary = module.model.rotary_emb
        self._heads, self._shared = config.num_attention_heads, config.num_key_value_heads
        self._size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._eps = config.rms_norm_eps
        self._activation = module.model.layers[0].mlp.act_fn
        self._layers = [_fused(layer) for layer in module.model.layers]
        self._ends = {"norm": module.model.norm.weight, "head": module.lm_head.weight}
        self._waves = torch.empty(0, 2, self._size, dtype=module.dtype)

    @staticmethod
    def fits(module: Any) -> bool:
        """Whether a model is of this build."""
        if type(module).__name__ not in _MODELS:
            return False
        return module.config.rope_parameters["rope_type"] in _ROPES

    def _places(self, positions: Tensor) -> Tensor:
        """Cosines and sines of rotary embeddings (Su et al., 2021), (B, Q, 2, size); sines have the signs of halves."""
        longest = int(positions.max()) + 1
        if len(self._waves) < longest:
            every = torch.arange(max(longest, 2 * len(self._waves))).unsqueeze(0)
            cos, sin = self._rotary(self._waves, every)
            half = self._size // 2
            self._waves = torch.stack([cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], -1)], 1)
        return self._waves[positions]

    def _weights(self) -> list[Tensor]:
        return [weight for each in (*self._layers, self._ends) for weight in each.values()]

    def _run(self, embedded: Tensor, places: Tensor, seen: Tensor, *rest: Tensor) -> Tensor:
        kept, given = rest[: 2 * len(self._layers)], iter(rest[2 * len(self._layers) :])
        x, waves = embedded, places.unsqueeze(3).unbind(2)
        for names, keys, values in zip(self._layers, kept[::2], kept[1::2], strict=True):
            x = self._layer(x, waves, seen, (keys, values), {name: next(given) for name in names})
        last = _normed(x[:, -1], next(given), self._eps)
        return functional.linear(last, next(given))

    def _layer(self, x: Tensor, waves: Sequence[Tensor], seen: Tensor, pair: Pair, has: Mapping[str, Tensor]) -> Tensor:
        y = _normed(x, has["before"], self._eps)
        y = functional.linear(y, has["inner"], has.get("inner_bias")).unflatten(-1, (-1, self._size))
        found = self._attended(
            *self._turned(y, waves, has), y.narrow(2, self._heads + self._shared, self._shared), seen, pair
        )
        x = x + functional.linear(found, has["outer"], has.get("outer_bias"))
        y = _normed(x, has["after"], self._eps)
        gate, up = functional.linear(y, has["wide"], has.get("wide_bias")).chunk(2, -1)
        return x + functional.linear(self._activation(gate) * up, has["narrow"], has.get("narrow_bias"))

    def _turned(self, y: Tensor, waves: Sequence[Tensor], has: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys, turned by their positions."""
        both = y.narrow(2, 0, self._heads + self._shared)
        if "query_norm" in has:
            parts = ((0, self._heads, "query_norm"), (self._heads, self._shared, "key_norm"))
            normed = [_normed(both.narrow(2, first, count), has[name], self._eps) for first, count, name in parts]
            both = torch.cat(normed, 2)
        cos, sin = waves
        turned = (both * cos).addcmul_(both.roll(self._size // 2, -1), sin)
        return turned.narrow(2, 0, self._heads), turned.narrow(2, self._heads, self._shared)

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, pair: Pair) -> Tensor:
        """What tokens take from those that they see, (B, Q, heads * size)."""
        keys, values = pair
        place(keys, key.transpose(1, 2)).copy_(key.transpose(1, 2))
        place(values, value.transpose(1, 2)).copy_(value.transpose(1, 2))
        return attended(query.transpose(1, 2), keys, values, seen, self._size**-0.5).flatten(2)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang and Sennrich, 2019), in fewer passes than ``functional.rms_norm`` makes on a CPU."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    found: Tensor = x * norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return found.mul_(weight)


def _fused(layer: Any) -> dict[str, Tensor]:
    """Weights of one layer, some of them in one."""
    attention, mlp = layer.self_attn, layer.mlp
    found = {"before": layer.input_layernorm.weight, "after": layer.post_attention_layernorm.weight}
    if hasattr(attention, "q_norm"):
        found |= {"query_norm": attention.q_norm.weight, "key_norm": attention.k_norm.weight}
    for name, layers in (
        ("inner", [attention.q_proj, attention.k_proj, attention.v_proj]),
        ("outer", [attention.o_proj]),
        ("wide", [mlp.gate_proj, mlp.up_proj]),
        ("narrow", [mlp.down_proj]),
    ):
        found[name] = _joined([one.weight for one in layers])
        if layers[0].bias is not None:
            found[f"{name}_bias"] = _joined([one.bias for one in layers])
    return found


def _joined(parts: Sequence[nn.Parameter]) -> Tensor:
    """One tensor of several, which become views of it."""
    whole = torch.cat([part.detach() for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        part.data = view
    return whole
