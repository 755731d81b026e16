"""Activation checkpointing: memory for time (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    import torch

__all__ = ["recompute_activations"]


def recompute_activations(model: torch.nn.Module) -> None:
    """Let ``model`` compute activations again in the backward pass rather than keep them.

    Raises:
        ConfigError: it does not offer that.
    """
    able: Any = next((one for one in model.modules() if hasattr(one, "gradient_checkpointing_enable")), None)
    if able is None:
        raise ConfigError(
            f"gradient_checkpointing is on, and {type(model).__name__} has no gradient_checkpointing_enable(): give it "
            "one, as models of transformers have it, or switch the setting off"
        )
    able.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
