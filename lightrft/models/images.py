"""Images and videos of a batch, as models of the Qwen2-VL family take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from lightrft.models.rows import Rows

__all__ = ["blank_image", "inputs"]

_KINDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}
_NAMES = {*_KINDS, *_KINDS.values(), "mm_token_type_ids"}
_IMAGE, _VIDEO = 1, 2


@contextmanager
def blank_image(model: nn.Module, given: Mapping[str, Any]) -> Iterator[None]:
    """Let the part of ``model`` that sees run once, with a blank image if nothing is ``given`` for it.

    Ranks whose samples have no images then gather the same weights in the same order as those whose samples have some.
    Nothing of a blank image comes into the result.

    Args:
        model: of the Qwen2-VL family.
        given: arguments of the model.

    Raises:
        ConfigError: there are images and videos, for which it runs twice; or it does not know blank images.
    """
    pixels = [name for name in _KINDS if given.get(name) is not None]
    if len(pixels) > 1:
        raise ConfigError(
            "mixed_mm_data: got images and videos in one batch, which are seen one after the other, and other ranks "
            "may have one of them: put them into batches of their own"
        )
    config: Any = getattr(model.config, "vision_config", None)
    if pixels or config is None:
        yield
        return
    seer = _seer(model)
    if seer is None:
        raise ConfigError(
            f"mixed_mm_data: {type(model).__name__} is not of the Qwen2-VL family, whose images are known"
        )
    side = config.spatial_merge_size
    blank = torch.zeros(side * side, config.in_channels * config.temporal_patch_size * config.patch_size**2)

    def see(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        grid = torch.tensor([[1, side, side]], device=embedded.device)
        seen = seer.get_image_features(blank.to(embedded.device), grid, return_dict=True).pooler_output
        return embedded + 0 * torch.cat(list(seen)).sum().to(embedded.dtype)

    hook = seer.get_input_embeddings().register_forward_hook(see)
    try:
        yield
    finally:
        hook.remove()


def inputs(model: nn.Module, sequences: Tensor, rows: Rows, given: Mapping[str, Any]) -> dict[str, Any]:
    """What ``model`` takes beside token ids and mask.

    Args:
        model: any.
        sequences: the batch, shape (batch, length), with one image token for each merged patch.
        rows: of the batch.
        given: ``pixel_values``, shape (patches, values), and ``image_grid_thw``, shape (images, 3), of all images as
            they follow each other in the batch; the same for videos; ``mm_token_type_ids`` of the batch, or without
            them those that image and video tokens have. ``None`` is as if not given.

    Raises:
        ConfigError: a name is unknown, one of a pair is missing, the model does not see, or its samples cannot share
            rows.
    """
    config: Any = model.config
    media = {name: value for name, value in given.items() if value is not None}
    if getattr(config, "vision_config", None) is None:
        if media:
            raise ConfigError(f"got {', '.join(media)} for {type(model).__name__}, which sees no images")
        return {}
    _check_names(media)
    kinds = media.pop("mm_token_type_ids", None)
    if kinds is None:
        kinds = (sequences == config.image_token_id).int() * _IMAGE + (
            sequences == config.video_token_id
        ).int() * _VIDEO
    owners = _owners(media, kinds * rows.real, config)
    if rows.order is None:
        return {**media, "mm_token_type_ids": kinds, "position_ids": None} if media else {}
    return {**_reordered(media, owners, rows.order), "position_ids": _positions(model, sequences, rows, kinds, media)}


def _seer(model: nn.Module) -> Any:
    """The part of a model of the Qwen2-VL family that sees; ``None`` of any other."""
    return next((one for one in model.modules() if hasattr(one, "get_rope_index")), None)


def _check_names(media: Mapping[str, Any]) -> None:
    if unknown := sorted(media.keys() - _NAMES):
        raise ConfigError(f"got {', '.join(unknown)}: expected some of {', '.join(sorted(_NAMES))}")
    for pixels, grid in _KINDS.items():
        if (pixels in media) != (grid in media):
            raise ConfigError(f"got one of {pixels} and {grid}: expected both or none")


def _positions(model: nn.Module, sequences: Tensor, rows: Rows, kinds: Tensor, media: Mapping[str, Any]) -> Tensor:
    """Position ids of packed rows, shape (4, rows, row length): for the attention mask, and for three axes of space."""
    if not media:
        return rows.position_ids.expand(4, -1, -1)
    seer = _seer(model)
    if seer is None:
        raise ConfigError(
            f"samples with images of {type(model).__name__} cannot share rows: expected a model of the Qwen2-VL "
            "family, or packed=False"
        )
    grids = {name: media.get(name) for name in _KINDS.values()}
    axes, _ = seer.get_rope_index(sequences, kinds, attention_mask=rows.real.long(), **grids)
    return torch.stack([rows.position_ids, *(rows.packed(axis) for axis in axes)])


def _owners(media: Mapping[str, Any], kinds: Tensor, config: Any) -> dict[str, list[list[int]]]:
    """By the name of their pixels, the numbers of the images (or videos) of each sample."""
    merged = config.vision_config.spatial_merge_size**2
    return {
        pixels: _shared_out(
            [patches // merged for patches in media[grid].prod(-1).tolist()], (kinds == kind).sum(1).tolist(), pixels
        )
        for kind, (pixels, grid) in zip((_IMAGE, _VIDEO), _KINDS.items(), strict=True)
        if pixels in media
    }


def _shared_out(sizes: list[int], tokens: list[int], name: str) -> list[list[int]]:
    """Which images each sample has, from the tokens of each image and those of each sample."""
    samples: list[list[int]] = []
    image = 0
    for wanted in tokens:
        mine: list[int] = []
        left = wanted
        while left > 0 and image < len(sizes):
            left -= sizes[image]
            mine.append(image)
            image += 1
        if left != 0:
            raise ConfigError(
                f"sample {len(samples)} has {wanted} tokens for {name}, which its {len(mine)} images do not fit: "
                "expected one token for each merged patch, and the images in the order of the samples"
            )
        samples.append(mine)
    if image < len(sizes):
        raise ConfigError(f"got {len(sizes)} images in {name}, and the samples have tokens for {image} of them")
    return samples


def _reordered(
    media: Mapping[str, Any], owners: Mapping[str, list[list[int]]], order: tuple[int, ...]
) -> dict[str, Any]:
    """Images in the order in which the rows have their samples."""
    found: dict[str, Any] = {}
    for pixels, samples in owners.items():
        grid = media[_KINDS[pixels]]
        parts = media[pixels].split(grid.prod(-1).tolist())
        numbers = [number for sample in order for number in samples[sample]]
        found |= {pixels: torch.cat([parts[number] for number in numbers]), _KINDS[pixels]: grid[numbers]}
    return found
