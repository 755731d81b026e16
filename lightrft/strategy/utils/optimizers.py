"""Which parameters an optimizer trains, and which of them decay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from lightrft.strategy.config import StrategyConfig

__all__ = ["adamw_settings", "parameter_groups"]


def adamw_settings(config: StrategyConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an AdamW: what is ``given``, and for the rest what ``config`` says.

    Raises:
        ConfigError: a name is none of ``lr``, ``betas``, ``eps``, ``weight_decay``.
    """
    usual = {
        "lr": config.actor_learning_rate,
        "betas": config.adam_betas,
        "eps": 1e-8,
        "weight_decay": config.weight_decay,
    }
    unknown = [name for name in given if name not in usual]
    if unknown:
        raise ConfigError(f"create_optimizer got {', '.join(unknown)}: expected some of {', '.join(usual)}")
    return usual | {name: value for name, value in given.items() if value is not None}


def parameter_groups(model: nn.Module, weight_decay: float, no_decay: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` as parameter groups of a torch optimizer.

    Weight decay is for matrices: parameters of one dimension or none (norms, biases, gains) and those named ``bias``
    get none. Tied parameters come once, frozen ones not at all, and the order is that of the model.

    Args:
        model: before or after sharding; what counts is the shape of the whole parameter.
        weight_decay: of the others.
        no_decay: parts of names; a parameter whose name contains one of them does not decay either.

    Returns:
        two groups, with and without decay, each with ``params`` and ``weight_decay``; one if the other would be empty.

    Raises:
        ConfigError: nothing is trainable, ``weight_decay`` is negative, or a part of a name occurs in no parameter's.
    """
    if not weight_decay >= 0:
        raise ConfigError(f"weight_decay={weight_decay!r}: expected 0 or a positive number")
    # Of a tied parameter every name counts, or the order of the modules would decide whether it decays.
    named = list(model.named_parameters(remove_duplicate=False))
    unknown = [part for part in no_decay if not any(part in name for name, _ in named)]
    if unknown:
        raise ConfigError(f"no_decay={unknown}: expected parts of the names of parameters, and none contains these")
    trainable = {id(p): p for _, p in named if p.requires_grad}
    if not trainable:
        raise ConfigError(
            f"{type(model).__name__} has no trainable parameter: set requires_grad, or do not make an optimizer for it"
        )
    spared = {id(p) for name, p in named if _is_spared(name, p, no_decay)}
    groups = [
        {"params": [p for key, p in trainable.items() if key not in spared], "weight_decay": weight_decay},
        {"params": [p for key, p in trainable.items() if key in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _is_spared(name: str, parameter: nn.Parameter, no_decay: Sequence[str]) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty vector in place of a parameter
    return len(shape) < 2 or name.rpartition(".")[2] == "bias" or any(part in name for part in no_decay)
