"""What a strategy knows of the models that it has prepared."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["Prepared", "Registry"]


@dataclass(eq=False, kw_only=True)
class Prepared:
    """One prepared model. It does not keep the model alive: who drops a model frees it.

    Attributes:
        optimizer: what steps it; ``None`` until there is one, and for a model that is only evaluated.
        scheduler: of its learning rate.
        training: whether it may be trained.
        micro_steps: micro-batches since the last optimizer step.
        steps: optimizer steps so far, skipped ones included.
        trained: names of the parameters that optimizer steps should have changed since the last verified update of the
            engine.
        verified: fingerprints of the weights of that update, by name.
        offloaded_at: where the model was offloaded, as ``file:line``; ``None`` while it is loaded.
        optimizer_offloaded_at: the same of its optimizer.
        backend: whatever the backend keeps of it.
    """

    optimizer: torch.optim.Optimizer | None = None
    scheduler: Any = None
    training: bool = False
    micro_steps: int = 0
    steps: int = 0
    trained: set[str] = field(default_factory=set)
    verified: Mapping[str, str] | None = None
    offloaded_at: str | None = None
    optimizer_offloaded_at: str | None = None
    backend: dict[str, Any] = field(default_factory=dict)
    _model: weakref.ref[torch.nn.Module] | None = None
    _module: weakref.ref[torch.nn.Module] | None = None

    @property
    def model(self) -> torch.nn.Module:
        """What the caller holds: an engine, or the module itself."""
        return self._alive(self._model)

    @property
    def module(self) -> torch.nn.Module:
        """The module inside, with the parameter names that it had before it was prepared."""
        return self._alive(self._module)

    def holds(self, model: object) -> bool:
        """Whether ``model`` is what the caller holds, or the module inside it."""
        return any(reference is not None and reference() is model for reference in (self._model, self._module))

    def _alive(self, reference: weakref.ref[torch.nn.Module] | None) -> torch.nn.Module:
        model = reference() if reference is not None else None
        if model is None:
            raise ConfigError("the prepared model was deleted while its optimizer is still in use: keep the model")
        return model


class Registry:
    """The prepared models of one strategy, found by the model, by the module inside it, or by its optimizer."""

    def __init__(self) -> None:
        self._prepared: weakref.WeakKeyDictionary[torch.nn.Module, Prepared] = weakref.WeakKeyDictionary()

    def __iter__(self) -> Iterator[Prepared]:
        return iter(list(self._prepared.values()))

    def add(self, prepared: Prepared, *, model: torch.nn.Module, module: torch.nn.Module | None = None) -> Prepared:
        """Remember ``prepared`` as what is known of ``model``, in place of what was known before.

        Args:
            prepared: what is known.
            model: what the caller gets and keeps.
            module: the module inside it; ``model`` itself if there is no wrapper.
        """
        prepared._model = weakref.ref(model)
        prepared._module = weakref.ref(model if module is None else module)
        self._prepared[model] = prepared
        return prepared

    def find(self, model: object) -> Prepared | None:
        """What is known of ``model``: the object that ``prepare`` returned, or the module inside it."""
        return next((one for one in self if one.holds(model)), None)

    def of(self, model: object) -> Prepared:
        """The same, where it must have been prepared.

        Raises:
            ConfigError: it has not been.
        """
        found = self.find(model)
        if found is None:
            raise ConfigError(
                f"{type(model).__name__} was not prepared by this strategy: pass it through strategy.prepare() or "
                "strategy.prepare_model(..., is_training=True) first, and use what they return"
            )
        return found

    def of_optimizer(self, optimizer: object) -> Prepared | None:
        """The model that ``optimizer`` steps, if it is known."""
        return next((one for one in self if optimizer is not None and one.optimizer is optimizer), None)
