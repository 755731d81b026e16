"""What a model sees of the images of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.trainer.experience import Images

__all__ = ["image_inputs_of"]

_NAMES = ("pixel_values", "image_grid_thw")


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
