"""What a model of an inference engine holds, as the weights of its checkpoint: fused ones apart, shards together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightrft.strategy.utils.fingerprints import fingerprint

__all__ = ["DTYPES", "fingerprints", "held"]

Shape = tuple[int, ...]

DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
"""By the names that engines have for them."""

_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What engines fuse, and of what, where a model does not say."""


@dataclass(frozen=True, slots=True)
class _Part:
    """What a rank holds of a weight: equal on so many neighbouring ranks."""

    tensor: Tensor
    copies: int = 1


def fingerprints(
    model: nn.Module,
    shapes: Mapping[str, Shape],
    *,
    dtype: torch.dtype | None = None,
    gather: Callable[[Any], list[Any]] | None = None,
) -> dict[str, str] | None:
    """The ``fingerprint`` of each weight that ``model`` holds; ``None`` if it cannot be told of one of them.

    Args:
        model: of vLLM, of SGLang, or of transformers: what this rank has of it.
        shapes: names of the checkpoint, and the shape of the whole weight.
        dtype: in which floating-point weights are told; that in which they are held if ``None``.
        gather: from what this rank has to what each rank of the engine has; collective. ``None`` for a rank alone.
    """
    found = {}
    for name, tensor in held(model, shapes, gather):
        if tensor is None:
            return None  # on all ranks: their models are the same
        found[name] = fingerprint(tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype))
    return found


def held(
    model: nn.Module, shapes: Mapping[str, Shape], gather: Callable[[Any], list[Any]] | None = None
) -> Iterator[tuple[str, Tensor | None]]:
    """Each weight that ``model`` holds, whole, one at a time; ``None`` for one that cannot be told. See above."""
    finder = _Finder(model)
    for name, shape in shapes.items():
        part = finder.part(name)
        if part is None:
            yield name, None
            continue
        parts = [part] if gather is None else gather(_Part(part.tensor.cpu(), part.copies))
        yield name, _joined([each.tensor for each in parts[:: part.copies]], shape)


def _joined(parts: Sequence[Tensor], shape: Shape) -> Tensor | None:
    """The whole weight; padding behind its end is cut off."""
    first = parts[0]
    if first.dim() != len(shape):
        return None
    if first.shape == shape:
        return first
    dim = next(dim for dim, size in enumerate(shape) if first.shape[dim] != size)
    whole = torch.cat(list(parts), dim)
    if whole.shape[dim] < shape[dim]:
        return None
    whole = whole.narrow(dim, 0, shape[dim])
    return whole if whole.shape == shape else None


class _Finder:
    """Finds weights of a checkpoint in the model of an engine."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        fused = getattr(model, "packed_modules_mapping", None) or _FUSED
        self._fused = {
            part: (whole, place) for whole, parts in fused.items() if len(parts) > 1 for place, part in enumerate(parts)
        }

    def part(self, name: str) -> _Part | None:
        """What this rank has of a weight; ``None`` if it is not found."""
        for candidate in dict.fromkeys((name, self._renamed(name))):
            if candidate in self._parameters:
                layer, _, kind = candidate.rpartition(".")
                return _Part(_value(self._model.get_submodule(layer), kind))
            found = self._of_a_fused_one(candidate, name)
            if found is not None:
                return found
        if name.endswith("lm_head.weight"):  # tied, and not there a second time
            embedding = next((one for one in self._parameters if one.endswith("embed_tokens.weight")), None)
            return None if embedding is None else _Part(self._parameters[embedding].detach())
        return None

    def _renamed(self, name: str) -> str:
        mapper = getattr(self._model, "hf_to_vllm_mapper", None)
        rename = getattr(mapper, "map_name", None) or getattr(mapper, "_map_name", None)
        return (rename(name) if rename is not None else None) or name

    def _of_a_fused_one(self, candidate: str, name: str) -> _Part | None:
        own = next((word for word in name.split(".") if word in self._fused), None)
        if own is None:
            return None
        whole, place = self._fused[own]
        candidate = ".".join(whole if word == own else word for word in candidate.split("."))
        if candidate not in self._parameters:
            return None
        layer, _, kind = candidate.rpartition(".")
        module = self._model.get_submodule(layer)
        sizes = getattr(module, "output_partition_sizes", ())
        if len(sizes) <= place:
            return None
        copies = getattr(module, "num_kv_head_replicas", 1) if place else 1
        return _Part(_value(module, kind).narrow(0, sum(sizes[:place]), sizes[place]), copies)


def _value(layer: nn.Module, kind: str) -> Tensor:
    """A parameter of a layer. vLLM packs linear layers on a CPU, and may throw the plain weight away."""
    plain: Tensor = getattr(layer, kind).detach()
    if kind != "weight" or not hasattr(layer, "cpu_linear"):
        return plain
    packed = _unpacked(layer, plain)
    return plain if plain.shape == packed.shape and torch.equal(plain, packed) else packed


def _unpacked(layer: Any, plain: Tensor) -> Tensor:
    """What the layer makes of the identity: its weight, to the bit but for the sign of zeros."""
    size = plain.shape[1] if plain.dim() == 2 else getattr(layer, "input_size_per_partition", layer.input_size)
    found: Tensor = layer.cpu_linear(torch.eye(size, dtype=plain.dtype), plain, None)
    return found.t().contiguous()
