"""Parameters of a model as its checkpoint has them: adapters merged, names and layouts of the files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightrft.errors import WeightSyncError
from lightrft.strategy.utils.saving import savable

__all__ = ["in_checkpoint_form", "keep_used_conversions"]

Named = tuple[str, Tensor]


def in_checkpoint_form(model: nn.Module, parameters: Iterable[Named]) -> Iterator[Named]:
    """``parameters`` of ``model`` as an engine loads them, each as soon as all that it is made of has come.

    The weights of LoRA adapters are merged into those that they adapt. Names, and layouts that transformers changes
    when it loads a model, are those of the files.

    Args:
        model: of transformers, perhaps with adapters of PEFT, or one that has such a model inside: what is outside of
            it is left out. Of any other model parameters stay as they are.
        parameters: names of the model and whole tensors.

    Raises:
        WeightSyncError: an adapter is of another kind than LoRA for linear layers, or was not sent whole.
    """
    prefix, inner = savable(model)
    own: Iterable[Named] = (
        (name.removeprefix(prefix), tensor) for name, tensor in parameters if name.startswith(prefix)
    )
    if inner is not None and getattr(inner, "peft_config", None):
        own = _Merging(inner).merged(own)
        inner = inner.get_base_model()  # type: ignore[operator]
    revert = _reverting(inner)
    for name, tensor in own:
        yield from revert(name, tensor)


def keep_used_conversions(model: nn.Module) -> None:
    """Let models of transformers forget conversions of names that loading them did not use.

    Loading without ZeRO-3 does so. With it, all that are known would be undone when the model is saved or sent, and
    give names that no checkpoint has.
    """
    for module in model.modules():
        known = vars(module).get("_weight_conversions")
        if known:
            module._weight_conversions = [one for one in known if one.was_used()]  # type: ignore[assignment]


def _reverting(model: nn.Module | None) -> Any:
    """From one parameter to what the checkpoint has of it."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # an older version, which changes names alone, or none
        return lambda name, tensor: [(name, tensor)]
    nothing: dict[str, Tensor] = {}
    if (
        not isinstance(model, PreTrainedModel)
        or getattr(model, "_weight_conversions", None) == []
        or revert_weight_conversion(model, nothing) is nothing
    ):  # to find that out for each parameter would take longer than to send it
        return lambda name, tensor: [(name, tensor)]
    return lambda name, tensor: revert_weight_conversion(model, {name: tensor}).items()


@dataclass(slots=True)
class _Adapted:
    """What has come of one layer with adapters."""

    weight: Tensor | None = None
    parts: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class _Merging:
    """Merges the active LoRA adapters of a model of PEFT (Hu et al., 2021): W + scaling * B A."""

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora import Linear

        self._layers: dict[str, Any] = {}
        for name, module in model.named_modules():
            if hasattr(module, "base_layer"):
                if not isinstance(module, Linear) or module.fan_in_fan_out or any(module.use_dora.values()):
                    raise WeightSyncError(
                        f"{name} has an adapter of {type(module).__name__}: LoRA of linear layers can be merged for "
                        "the engine"
                    )
                self._layers[name] = module
        self._open: dict[str, _Adapted] = {name: _Adapted() for name in self._layers}

    def merged(self, parameters: Iterable[Named]) -> Iterator[Named]:
        """The parameters without adapters, under the names of the model that is adapted."""
        for name, tensor in parameters:
            layer, _, rest = self._layer_of(name)
            if layer is None:
                yield _plain(name), tensor
            else:
                yield from self._add(layer, rest, tensor)
        if self._open:
            raise WeightSyncError(f"the adapters of {next(iter(self._open))} were not sent whole")

    def _layer_of(self, name: str) -> tuple[str | None, str, str]:
        for marker in (".base_layer.", ".lora_"):
            layer, found, rest = name.partition(marker)
            if found and layer in self._layers:
                return layer, found, found[1:] + rest
        return None, "", ""

    def _add(self, layer: str, rest: str, tensor: Tensor) -> Iterator[Named]:
        if rest == "base_layer.bias":
            yield _plain(f"{layer}.bias"), tensor
            return
        held = self._open[layer]
        if rest == "base_layer.weight":
            held.weight = tensor
        else:
            kind, adapter, _ = rest.split(".", 2)
            held.parts.setdefault(adapter, {})[kind] = tensor
        module = self._layers[layer]
        wanted = [name for name in module.active_adapters if name in module.lora_A]
        whole = all(len(held.parts.get(name, {})) == len(("lora_A", "lora_B")) for name in (*wanted, *module.lora_A))
        if held.weight is not None and whole:
            del self._open[layer]
            yield _plain(f"{layer}.weight"), _sum(held, [(name, module.scaling[name]) for name in wanted])


def _sum(held: _Adapted, adapters: list[tuple[str, float]]) -> Tensor:
    assert held.weight is not None
    if not adapters:
        return held.weight
    merged = held.weight.detach().to(torch.float32, copy=True)
    for name, scaling in adapters:
        parts = held.parts[name]
        merged += scaling * (parts["lora_B"].float() @ parts["lora_A"].float())
    return merged.to(held.weight.dtype)


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")
