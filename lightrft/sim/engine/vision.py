"""Images and videos as models of the Qwen2-VL family take them: patches, features, places."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightrft.errors import ConfigError
from lightrft.sim.engine.media import media_digest
from lightrft.sim.engine.samples import Medium

__all__ = ["Features", "Patches"]

_VIDEOS = frozenset({"qwen2_vl"})
"""Types of models whose videos are frames and nothing else: later ones take times too."""


class Patches:
    """Cuts images and videos into patches, by the image processor in the folder of a model.

    Args:
        path: of the folder.
        config: of the model.
    """

    def __init__(self, path: str, config: Any) -> None:
        self._path = path
        self._config = config
        self._processor: Any = None

    def medium(self, kind: str, given: Any) -> Medium:
        """An image of Pillow, or an array of one, (height, width, 3); or the frames of a video, several of these.

        Raises:
            ConfigError: the folder has no image processor, or the model has other videos.
            ValueError: it is no image, and no video.
        """
        frames = [given] if kind == "image" else list(given)
        if kind == "video" and self._config.model_type not in _VIDEOS:
            raise ConfigError(
                f"the fake engine in model mode takes no videos for {self._config.model_type}: use its hash mode"
            )
        sizes = {} if kind == "image" else _video_sizes(self._path)
        cut = self._images()(images=frames, return_tensors="pt", **sizes)
        patches, grid = cut["pixel_values"], cut["image_grid_thw"][0].tolist()
        if kind == "video":
            patches, grid[0] = self._in_time(patches, len(frames))
        merged = self._config.vision_config.spatial_merge_size**2
        digest = media_digest([kind, given])
        return Medium(kind, digest, int(np.prod(grid)) // merged, (patches, torch.tensor([grid])))

    def _images(self) -> Any:
        if self._processor is None:
            from transformers import AutoImageProcessor

            try:
                self._processor = AutoImageProcessor.from_pretrained(self._path)  # type: ignore[no-untyped-call, unused-ignore]
            except (OSError, ValueError, ImportError) as error:
                raise ConfigError(
                    f"the fake engine has no image processor for the images of a prompt: there is none in {self._path} "
                    f"that can be used ({error})"
                ) from error
        return self._processor

    def _in_time(self, patches: Tensor, frames: int) -> tuple[Tensor, int]:
        """Patches of a video from those of its frames, and how many follow each other.

        A patch of an image has the image several times; the n-th of them is taken from the n-th frame.
        """
        deep = self._config.vision_config.temporal_patch_size
        channels, side = self._config.vision_config.in_channels, self._config.vision_config.patch_size
        each = patches.view(frames, -1, channels, deep, side, side)
        each = torch.cat([each, each[-1:].expand(-frames % deep, *each.shape[1:])])
        groups = each.unflatten(0, (-1, deep))
        joined = torch.stack([groups[:, place, :, :, place] for place in range(deep)], 3)
        return joined.flatten(0, 1).flatten(1), len(groups)


def _video_sizes(path: str) -> dict[str, Any]:
    """Limits for the size of a frame, if the folder has some of its own for videos."""
    for name, keys in (("video_preprocessor_config.json", ()), ("processor_config.json", ("video_processor",))):
        file = Path(path) / name
        found: Any = json.loads(file.read_text()) if file.is_file() else {}
        for key in keys:
            found = found.get(key) or {}
        if found.get("size"):
            return {"size": found["size"]}
    return {}


class Features:
    """What the vision encoder makes of images and videos.

    Args:
        module: the model.
        remembers: whether it is made once for each, until ``forget``: the encoder cache.
    """

    def __init__(self, module: Any, *, remembers: bool) -> None:
        self._module = module
        self._remembers = remembers
        self._known: dict[int, Tensor] = {}

    def forget(self) -> None:
        """Empty the encoder cache."""
        self._known.clear()

    def _of(self, medium: Medium) -> Tensor:
        found = self._known.get(medium.digest)
        if found is None:
            encode = getattr(self._module.model, f"get_{medium.kind}_features")
            patches, grid = medium.content
            found = torch.cat(list(encode(patches.to(self._module.dtype), grid, return_dict=True).pooler_output))
            if self._remembers:
                self._known[medium.digest] = found
        return found

    def placed(self, ids: Tensor, embedded: Tensor, media: Sequence[Medium]) -> tuple[Tensor, Tensor, int]:
        """A prompt with images and videos.

        Args:
            ids: its tokens, (1, Q).
            embedded: as vectors, (1, Q, H).
            media: in it, those of a kind in order.

        Returns:
            The vectors with features in their places, positions (3, 1, Q), and what is added to those of later tokens.
        """
        kinds, grids = torch.zeros_like(ids), {}
        for number, kind in enumerate(("image", "video"), 1):
            mine = [medium for medium in media if medium.kind == kind]
            if mine:
                places = ids == getattr(self._module.config, f"{kind}_token_id")
                kinds[places] = number
                features = torch.cat([self._of(medium) for medium in mine])
                embedded = embedded.masked_scatter(places.unsqueeze(-1), features.to(embedded.dtype))
                grids[f"{kind}_grid_thw"] = torch.cat([medium.content[1] for medium in mine])
        positions, shift = self._module.model.get_rope_index(ids, mm_token_type_ids=kinds, **grids)
        return embedded, positions, int(shift)
