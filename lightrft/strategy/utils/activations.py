"""Computing activations again in the backward pass rather than keeping them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["recompute"]


def recompute(model: nn.Module) -> None:
    """Let ``model``, or the first module inside that can, compute activations again in the backward pass.

    Raises:
        ConfigError: none offers that.
    """
    able: Any = next((one for one in model.modules() if hasattr(one, "gradient_checkpointing_enable")), None)
    if able is None:
        raise ConfigError(
            f"gradient_checkpointing is on, and {type(model).__name__} has no gradient_checkpointing_enable(): give it "
            "one, as models of transformers have it, or switch the setting off"
        )
    able.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
