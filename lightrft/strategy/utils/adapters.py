"""Models with adapters of PEFT as the plain models that compute the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightrft.errors import WeightSyncError

__all__ = ["merged"]

Named = tuple[str, Tensor]


def merged(model: nn.Module, parameters: Iterable[Named]) -> Iterator[Named]:
    """``parameters`` of ``model`` without adapters, under the names of the model that is adapted.

    What comes out computes what ``model`` computes now: adapters that are in use are added to what they adapt (Hu et
    al., 2021: W + scaling * B A), those that PEFT has merged already are not added again, and of a copy that is trained
    in place of a module (``modules_to_save``) and that module, the one in use is kept.

    Raises:
        WeightSyncError: an adapter is of another kind than LoRA for linear layers, adds a bias where there is none,
            unties the output layer from the embedding, or was not sent whole.
    """
    _check_ties(model)
    names = _Names.of(model)
    for name, tensor in parameters:
        yield from names.arrived(name, tensor)
    if names.sums:
        layer = next(iter(names.sums.values())).name.rpartition(".")[0]
        raise WeightSyncError(f"the adapters of {layer} were not sent whole")


@dataclass(slots=True, kw_only=True)
class _Sum:
    """A weight or bias of an adapted layer, and what is added to it.

    Attributes:
        name: of the result.
        base: name of what is adapted.
        added: the factor, and the names of one addend or of two whose product it is.
        parts: what has come, by name.
    """

    name: str
    base: str
    added: Sequence[tuple[float, tuple[str, ...]]]
    parts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all parts."""
        return [self.base, *(name for _, several in self.added for name in several)]

    @property
    def is_whole(self) -> bool:
        """Whether all parts have come."""
        return len(self.parts) == len(self.names)

    def value(self) -> Tensor:
        """The sum, computed in single precision."""
        base = self.parts[self.base]
        if not self.added:
            return base
        total = base.detach().to(torch.float32, copy=True)
        for factor, (first, *second) in self.added:
            term = self.parts[first].float()
            total += factor * (term @ self.parts[second[0]].float() if second else term)
        return total.to(base.dtype)


@dataclass(slots=True)
class _Names:
    """What becomes of the parameters of a model of PEFT, by name.

    Attributes:
        sums: those that are part of a sum.
        copies: those of modules that have a trained copy, and are in use: what they are called without it.
        left_out: those of such modules and of adapters that are not in use.
    """

    sums: dict[str, _Sum] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, model: nn.Module) -> _Names:
        from peft.utils.other import ModulesToSaveWrapper

        found = cls()
        for name, module in model.named_modules():
            if hasattr(module, "base_layer"):
                found.left_out |= _names_in(name, module)
                found.sums |= {part: one for one in _sums(name, module) for part in one.names}
            elif isinstance(module, ModulesToSaveWrapper):
                used, own = f"{name}.{_used_copy(module)}.", _names_in(name, module)
                found.left_out |= own
                found.copies |= {one: f"{name}.{one.removeprefix(used)}" for one in own if one.startswith(used)}
        return found

    def arrived(self, name: str, tensor: Tensor) -> list[Named]:
        """What can be passed on now that a parameter has come: at most one."""
        if name in self.sums:
            one = self.sums.pop(name)
            one.parts[name] = tensor
            return [(_plain(one.name), one.value())] if one.is_whole else []
        if name in self.copies:
            return [(_plain(self.copies[name]), tensor)]
        return [] if name in self.left_out else [(_plain(name), tensor)]


def _names_in(prefix: str, module: nn.Module) -> set[str]:
    several = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {f"{prefix}.{name}" for name, _ in several}


def _sums(layer: str, module: Any) -> list[_Sum]:
    if not _is_plain_lora(module):
        raise WeightSyncError(
            f"{layer} has an adapter of {type(module).__name__}: LoRA of linear layers can be merged for the engine"
        )
    used = _used_adapters(module)
    weights = [(factor, (f"{layer}.lora_B.{name}.weight", f"{layer}.lora_A.{name}.weight")) for name, factor in used]
    biases = [
        (factor, (f"{layer}.lora_B.{name}.bias",)) for name, factor in used if module.lora_B[name].bias is not None
    ]
    found = [_Sum(name=f"{layer}.weight", base=f"{layer}.base_layer.weight", added=weights)]
    if module.base_layer.bias is not None:
        found.append(_Sum(name=f"{layer}.bias", base=f"{layer}.base_layer.bias", added=biases))
    elif biases:
        raise WeightSyncError(
            f"an adapter of {layer} adds a bias (lora_bias), and the layer has none: the engine has no place for it"
        )
    return found


def _is_plain_lora(module: Any) -> bool:
    """Whether an adapter adds B A to a linear layer, and computes nothing more, as that of DoRA does."""
    from peft.tuners.lora import Linear

    if not isinstance(module, Linear) or module.fan_in_fan_out:
        return False
    return not any(module.use_dora.values()) and not getattr(module, "lora_variant", None)


def _used_adapters(module: Any) -> list[tuple[str, float]]:
    """Names and factors of the adapters that ``forward`` adds to the weight as it is."""
    if module.disable_adapters:  # forward takes away what was merged
        return [(name, -module.scaling[name]) for name in module.merged_adapters if name in module.lora_A]
    if module.merged:
        return []
    return [(name, module.scaling[name]) for name in module.active_adapters if name in module.lora_A]


def _used_copy(module: Any) -> str:
    """Where in a module that has trained copies the one is that ``forward`` calls."""
    active = module.active_adapters
    if module.disable_adapters or not active or any(name not in module.modules_to_save for name in active):
        return "original_module"
    return f"modules_to_save.{active[0]}"


def _check_ties(model: Any) -> None:
    """A copy of one of two tied layers is tied no more, and the engine, which reads the configuration, ties them."""
    base = model.get_base_model()
    config: Any = getattr(base, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(config, "tie_word_embeddings", False):
        return
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if any(hasattr(one, "modules_to_save") for one in ends) and ends[0].weight is not ends[1].weight:
        raise WeightSyncError(
            "modules_to_save has a copy of the embedding or of the output layer, which the model ties to each other: "
            "the engine would tie them again. Pass both to modules_to_save with ensure_weight_tying=True, or neither"
        )


def _plain(name: str) -> str:
    """A name of a model of PEFT as the model inside of it has it."""
    return name.removeprefix("base_model.model.")
