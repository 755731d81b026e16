"""The AdamW that DeepSpeed steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError
from lightrft.strategy.deepspeed import runtime
from lightrft.strategy.deepspeed.parameters import shape_of

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from lightrft.strategy.config import StrategyConfig

__all__ = ["change", "create", "mark_decay", "settings"]

_KNOWN = ("lr", "betas", "eps", "weight_decay")
_DECAYS = "decays"


def settings(config: StrategyConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer is to have: what is given and not ``None``, else what the config says.

    Raises:
        ConfigError: something else is given.
    """
    unknown = sorted(given.keys() - set(_KNOWN))
    if unknown:
        raise ConfigError(f"create_optimizer got {', '.join(unknown)}: expected any of {', '.join(_KNOWN)}")
    default = {
        "lr": config.actor_learning_rate,
        "betas": tuple(config.adam_betas),
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }
    return default | {name: value for name, value in given.items() if value is not None}


def create(model: torch.nn.Module, wanted: Mapping[str, Any], *, offload: bool) -> Optimizer:
    """An optimizer of the trainable parameters; one-dimensional ones do not decay.

    Args:
        model: not yet prepared; it may have been built spread over the ranks.
        wanted: as ``settings`` gives it.
        offload: whether it steps on the CPU.

    Raises:
        ConfigError: nothing is trainable.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(f"{type(model).__name__} has no trainable parameter: an optimizer would have nothing to step")
    groups: list[dict[str, Any]] = [
        {"params": [one for one in trained if len(shape_of(one)) > 1]},
        {"params": [one for one in trained if len(shape_of(one)) <= 1], "weight_decay": 0.0},
    ]
    adam: Any = runtime.adam_class(offload=offload)
    optimizer: Optimizer = adam([group for group in groups if group["params"]], **wanted)
    return optimizer


def mark_decay(optimizer: Optimizer) -> None:
    """Note down which groups may decay, before DeepSpeed makes one flat parameter of each."""
    for group in optimizer.param_groups:
        group[_DECAYS] = any(len(shape_of(one)) > 1 for one in group["params"])


def change(optimizer: Optimizer | None, wanted: Mapping[str, Any], *, name: str) -> Optimizer:
    """Let ``optimizer``, which steps a prepared model already, go on with other settings.

    Args:
        optimizer: of an engine.
        wanted: as ``settings`` gives it.
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
