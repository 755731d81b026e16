"""The AdamW that DeepSpeed steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError
from lightrft.strategy.deepspeed import runtime
from lightrft.strategy.deepspeed.parameters import shape_of
from lightrft.strategy.utils.optimizers import parameter_groups

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

__all__ = ["change", "create", "mark_decay"]

_DECAYS = "decays"


def create(model: torch.nn.Module, wanted: Mapping[str, Any], *, offload: bool) -> Optimizer:
    """An optimizer of the trainable parameters.

    Args:
        model: not yet prepared; it may have been built spread over the ranks.
        wanted: as ``adamw_settings`` gives it.
        offload: whether it steps on the CPU.

    Raises:
        ConfigError: nothing is trainable.
    """
    adam: Any = runtime.adam_class(offload=offload)
    optimizer: Optimizer = adam(parameter_groups(model, wanted["weight_decay"]), **wanted)
    return optimizer


def mark_decay(optimizer: Optimizer) -> None:
    """Note down which groups may decay, before DeepSpeed makes one flat parameter of each."""
    for group in optimizer.param_groups:
        group[_DECAYS] = any(len(shape_of(one)) > 1 for one in group["params"])


def change(optimizer: Optimizer | None, wanted: Mapping[str, Any], *, name: str) -> Optimizer:
    """Let ``optimizer``, which steps a prepared model already, go on with other settings.

    Args:
        optimizer: of an engine.
        wanted: as ``adamw_settings`` gives it.
        name: of the model, for messages.

    Raises:
        ConfigError: it is none that has them.
    """
    lacking = [key for key in wanted if optimizer is None or key not in optimizer.defaults]
    if optimizer is None or lacking:
        raise ConfigError(
            f"{name} was prepared with {type(optimizer).__name__}, which has no {', '.join(lacking)}: create the "
            "optimizer before prepare(), or prepare the model without one"
        )
    for group in optimizer.param_groups:
        group.update(wanted)
        group.pop("initial_lr", None)  # of a schedule that began with the former learning rate
        if not group.get(_DECAYS, True):
            group["weight_decay"] = 0.0
    return optimizer
