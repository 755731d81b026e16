"""What a model sees of the images of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightrft.trainer.experience import Images

__all__ = ["ImageReader", "media_tokens"]

_NAMES = ("pixel_values", "image_grid_thw")
_SPECIAL = ("image_token_id", "video_token_id")


class ImageReader:
    """Makes tensors of the images of one prompt.

    Args:
        processor: of transformers, of the Qwen2-VL family; or its image processor.
    """

    def __init__(self, processor: Any) -> None:
        self._reader = getattr(processor, "image_processor", processor)

    def __call__(self, images: Sequence[Any]) -> Images:
        """``pixel_values`` and ``image_grid_thw``. Those of several prompts, one after the other, are of a batch."""
        found = self._reader(images=list(images), return_tensors="pt")
        return {name: found[name] for name in _NAMES if name in found}

    def tokens(self, seen: Images, count: int) -> int:
        """How many tokens ``count`` images become in the model, of which there is one each in the prompt."""
        if "image_grid_thw" not in seen:
            return count
        merged = int(getattr(self._reader, "merge_size", 1)) ** 2
        return int(seen["image_grid_thw"].prod(-1).sum()) // merged


def media_tokens(model: Any) -> tuple[int, ...]:
    """The tokens that stand for images and videos in ``model``, in this order; only prompts may have some."""
    config = getattr(model, "config", None)
    found = (getattr(config, name, None) for name in _SPECIAL)
    return tuple(token for token in found if isinstance(token, int))
