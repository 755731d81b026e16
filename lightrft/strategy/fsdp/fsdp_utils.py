"""What is sharded as a unit, over which ranks, and in which precision."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from lightrft.strategy.config import StrategyConfig

__all__ = [
    "blocks_of",
    "forget_gradients",
    "let_go",
    "local",
    "low_precision",
    "make_mesh",
    "offload_policy",
    "precision_policy",
    "sharded_parameters",
    "whole",
]

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


# -- Units ------------------------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time, in order; everything else is gathered with ``model`` itself.

    They are the blocks that a transformers model declares (``_no_split_modules``), wherever in ``model`` it is; in
    other models, the modules of those classes that occur more than once in ``nn.ModuleList``. A block that shares a
    parameter with the rest of the model, such as an embedding tied to the head, is none.
    """
    declared = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = _outermost(model, lambda module, _: type(module).__name__ in declared)
    if not found:
        listed = Counter(
            type(child) for module in model.modules() if isinstance(module, nn.ModuleList) for child in module
        )
        found = _outermost(model, lambda module, parent: isinstance(parent, nn.ModuleList) and listed[type(module)] > 1)
    everywhere = _uses(model)
    return [block for block in found if all(everywhere[one] == count for one, count in _uses(block).items())]


def _outermost(module: nn.Module, is_block: Any) -> list[nn.Module]:
    found: dict[nn.Module, None] = {}
    for child in module.children():
        if not isinstance(child, _CONTAINERS) and is_block(child, module) and any(True for _ in child.parameters()):
            found[child] = None
        else:
            found.update(dict.fromkeys(_outermost(child, is_block)))
    return list(found)


def _uses(module: nn.Module) -> Counter[nn.Parameter]:
    """How many modules inside hold each parameter."""
    return Counter(one for inner in module.modules() for one in inner._parameters.values() if one is not None)


# -- Ranks ------------------------------------------------------------------------------------------------------------


def make_mesh(device: torch.device, world_size: int, shard_size: int) -> DeviceMesh:
    """All ranks; with copies of the weights on every ``shard_size`` consecutive ranks if those are fewer. *Collective*.

    Args:
        device: of this rank.
        world_size: number of ranks; ``shard_size`` divides it.
        shard_size: ranks that share one copy; -1 for all.
    """
    if shard_size in {-1, world_size}:
        return init_device_mesh(device.type, (world_size,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


# -- Precision --------------------------------------------------------------------------------------------------------


def low_precision(config: StrategyConfig) -> torch.dtype | None:
    """The 16-bit dtype that the settings ask to compute in; ``None`` for that of the model."""
    if config.bf16:
        return torch.bfloat16
    return torch.float16 if config.fp16 else None


def precision_policy(model: nn.Module, config: StrategyConfig) -> MixedPrecisionPolicy:
    """Compute in the dtype of the settings; accumulate and reduce gradients in fp32, those of fp64 in fp64."""
    double = any(parameter.dtype == torch.float64 for parameter in model.parameters())
    return MixedPrecisionPolicy(param_dtype=low_precision(config), reduce_dtype=None if double else torch.float32)


def offload_policy(config: StrategyConfig, device: torch.device) -> OffloadPolicy:
    """Parameters, gradients and optimizer states in host memory, or all on the device."""
    if not config.fsdp_cpu_offload:
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=device.type == "cuda")


# -- Sharded parameters -----------------------------------------------------------------------------------------------


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """All of a tensor that may be sharded, on every rank. *Collective*.

    Args:
        tensor: this rank's part may be in host memory.
        device: of this rank: where the ranks communicate, and where the result is.
        dtype: to cast to before parts are exchanged.
    """
    part = tensor.detach().to(device=device, dtype=dtype)
    return part.full_tensor() if isinstance(part, DTensor) else part


def sharded_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name, each once, as this rank keeps them between steps.

    After a forward pass without backward, a module may still hold gathered parameters; they are let go.
    """
    let_go(module)
    return dict(module.named_parameters())


def let_go(module: nn.Module) -> None:
    """Free gathered parameters that a forward pass without backward has left, before the sharded ones change."""
    for unit in _units(module):
        unit.reshard()


def forget_gradients(module: nn.Module) -> None:
    """Clear the gradients, also those that are not reduced over the ranks yet."""
    for unit in _units(module):
        for group in _parameter_groups(unit):
            group._partial_reduce_output = None
            for one in group.fsdp_params:
                one.unsharded_accumulated_grad = None
                if (gathered := getattr(one, "_unsharded_param", None)) is not None:
                    gathered.grad = None
    module.zero_grad()


def _units(module: nn.Module) -> Iterator[FSDPModule]:
    return (one for one in module.modules() if isinstance(one, FSDPModule))


def _parameter_groups(unit: FSDPModule) -> list[Any]:
    """FSDP2 has no public way to its unreduced gradients; torch 2.11 and 2.12 name one group, 2.13 names several."""
    state: Any = unit._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)
    if several is None:
        several = [state._fsdp_param_group]
    return [group for group in several if group is not None]
