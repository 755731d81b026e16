"""What a model sees of the images of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.trainer.experience import Images

__all__ = ["image_inputs_of", "media_tokens"]

_NAMES = ("pixel_values", "image_grid_thw")


def media_tokens(model: Any) -> tuple[int, ...]:
    """The tokens that stand for images and videos in ``model``, of which only prompts may have some."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return tuple(token for token in found if isinstance(token, int))


def image_inputs_of(processor: Any) -> Callable[[Sequence[Any]], Images] | None:
    """Makes tensors of the images of one prompt, by a processor of transformers; ``None`` without one.

    The tensors of several prompts, one after the other, are those of a batch: ``pixel_values`` and ``image_grid_thw``
    of the Qwen2-VL family.
    """
    if processor is None:
        return None
    reader = getattr(processor, "image_processor", processor)

    def inputs(images: Sequence[Any]) -> Images:
        found = reader(images=list(images), return_tensors="pt")
        return {name: found[name] for name in _NAMES if name in found}

    return inputs
