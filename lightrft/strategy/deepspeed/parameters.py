"""Parameters of a DeepSpeed engine, partitioned or not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from lightrft.strategy.deepspeed.deepspeed_utils import ModelSize

if TYPE_CHECKING:
    import torch

__all__ = ["full", "gathered", "is_partitioned", "own_part", "own_partition", "shape_of", "size_of"]


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has spread the parameter over the ranks."""
    return hasattr(parameter, "ds_id")


def shape_of(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter; that of one that is spread over the ranks says nothing."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def size_of(model: torch.nn.Module) -> ModelSize:
    """What buffers for ``model`` are measured by."""
    shapes = [shape_of(parameter) for parameter in model.parameters()]
    return ModelSize(
        elements=sum(shape.numel() for shape in shapes),
        width=max((shape.numel() for shape in shapes if len(shape) == 1), default=0),
    )


def full(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The parameters of ``model``, each whole on every rank until the next is asked for. *Collective*.

    A tied parameter comes once, under its first name.
    """
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            yield name, parameter


def own_part(parameter: Any, whole: torch.Tensor) -> torch.Tensor:
    """What of ``whole``, which has the shape of a partitioned parameter, is in this rank's partition; zeros follow."""
    part = parameter.ds_tensor
    first = dist.get_rank(parameter.ds_process_group) * part.numel()
    found = whole.reshape(-1)[first : first + part.numel()]
    padded = found.new_zeros(part.numel(), device=part.device)
    padded[: found.numel()] = found
    return padded


def own_partition(parameter: Any) -> torch.Tensor:
    """This rank's partition, to be written into: what is gathered of the parameter is freed, also what zpg keeps."""
    parameter.partition()
    parameter.ds_secondary_tensor = None
    found: torch.Tensor = parameter.ds_tensor
    return found


def gathered(parameters: Iterable[torch.Tensor], *, written_by: int | None = None) -> Any:
    """A context in which ``parameters`` are whole on every rank. *Collective*.

    Args:
        parameters: partitioned or not.
        written_by: the rank whose values are kept when the context ends; ``None`` if they are only read.
    """
    import deepspeed

    several = [parameter for parameter in parameters if is_partitioned(parameter)]
    return deepspeed.zero.GatheredParameters(several, modifier_rank=written_by, enabled=bool(several))
