"""The only place that chooses a backend: ``get_strategy``, and ``register_strategy`` for classes of one's own."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError
from lightrft.strategy.config import StrategyConfig
from lightrft.strategy.extras import naming_extras

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase

__all__ = ["get_strategy", "register_strategy"]

_BUILT_IN = {
    "deepspeed": ("lightrft.strategy.deepspeed.deepspeed", "DeepspeedStrategy"),
    "fsdp": ("lightrft.strategy.fsdp.fsdpv2", "FSDPV2Strategy"),
    "fake": ("lightrft.strategy.fake_strategy", "FakeStrategy"),
}

_registered: dict[str, type[StrategyBase]] = {}
"""Classes that users registered; every simulated rank has its own (``lightrft.sim.libraries``)."""


def get_strategy(args: Any = None, **overrides: Any) -> StrategyBase:
    """The strategy that ``args`` asks for: the one that ``strategy`` names, else FSDP with ``fsdp``, else DeepSpeed.

    Args:
        args: parsed arguments, a mapping, an object with attributes, a ``StrategyConfig``, or ``None`` (the defaults).
            The strategy keeps it as ``strategy.args``; with overrides it keeps the resulting ``StrategyConfig``.
        overrides: settings that win over those of ``args``.

    Raises:
        ConfigError: if the configuration cannot be built, no strategy has the name, or a package is missing; the
            message names the extra to install.
    """
    kind = type(args) if isinstance(args, StrategyConfig) else StrategyConfig
    config = kind.from_args(args, **overrides)
    name = config.strategy or ("fsdp" if config.fsdp else "deepspeed")
    with naming_extras(f"the strategy {name!r}"):
        return _class_of(name)(
            seed=config.seed,
            max_norm=config.max_norm,
            micro_train_batch_size=config.micro_train_batch_size,
            train_batch_size=config.train_batch_size,
            args=config if overrides else args,
        )


def register_strategy(name: str, cls: type[StrategyBase], *, override: bool = False) -> None:
    """Make ``cls`` the strategy that ``args.strategy = name``, or ``--strategy name``, asks for.

    ``get_strategy`` builds it as ``cls(seed=..., max_norm=..., micro_train_batch_size=..., train_batch_size=...,
    args=...)``. To register the same class again, or a class of the same module and name (its module was executed
    again), is allowed.

    Args:
        name: any name that is not taken.
        cls: a subclass of ``StrategyBase`` that implements all of its abstract methods.
        override: take a name that stands for another class, also that of a built-in strategy.

    Raises:
        ConfigError: if the name is taken, or ``cls`` is no such class.
    """
    _check(name, cls)
    holder = _holder(name)
    if not override and holder not in {None, _path(cls)}:
        raise ConfigError(
            f"the strategy {name!r} is {holder} already: register {_path(cls)} by another name, or with override=True"
        )
    _registered[name] = cls


def _class_of(name: str) -> type[StrategyBase]:
    if name in _registered:
        return _registered[name]
    if name not in _BUILT_IN:
        known = ", ".join(sorted({*_BUILT_IN, *_registered}))
        raise ConfigError(f"strategy={name!r} is unknown: expected one of {known}; register_strategy adds another one")
    module, attribute = _BUILT_IN[name]
    found: type[StrategyBase] = getattr(importlib.import_module(module), attribute)
    return found


def _check(name: Any, cls: Any) -> None:
    from lightrft.strategy.strategy_base import StrategyBase

    if not isinstance(name, str) or not name:
        raise ConfigError(f"name={name!r}: expected the name of a strategy, a string that is not empty")
    if not isinstance(cls, type) or not issubclass(cls, StrategyBase):
        raise ConfigError(f"{cls!r}: expected a class that inherits from {_path(StrategyBase)}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise ConfigError(f"{_path(cls)} does not implement {missing}: without them it cannot be built")


def _holder(name: str) -> str | None:
    """The class that the name stands for, as a path; ``None`` if it is free."""
    if name in _registered:
        return _path(_registered[name])
    return ".".join(_BUILT_IN[name]) if name in _BUILT_IN else None


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
