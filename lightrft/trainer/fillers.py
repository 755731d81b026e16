"""What goes through models that see where a batch has no image, so that all ranks pass through the part that sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist

from lightrft.trainer.experience import Sample

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase
    from lightrft.trainer.images import ImageReader

__all__ = ["blank", "image_filler"]


_SIDE = 56
"""Pixels of a blank image."""


def image_filler(samples: Sequence[Sample], strategy: StrategyBase) -> Sample | None:
    """A sample with an image, on every rank, if there is one on any. *Collective*.

    A model whose weights are spread over the ranks gathers those that see only where a batch has images. A batch
    without any gets this one beside its own, with nothing in it to learn from, or the ranks would wait for each other.

    Args:
        samples: of this rank.
        strategy: whose ranks these are.

    Returns:
        A prompt with images and one token more; ``None`` if no rank has images.
    """
    mine = min((one for one in samples if one.images), key=lambda one: len(one.prompt_token_ids), default=None)
    nobody = strategy.world_size
    found = strategy.all_reduce(
        {"first": -nobody if mine is None else -strategy.get_rank(), "lacking": int(mine is None)}, op="max"
    )
    if found["first"] == -nobody:
        return None
    if found["lacking"]:
        box = [mine]
        dist.broadcast_object_list(box, src=-found["first"])
        mine = box[0] if mine is None else mine
    assert mine is not None
    return dataclasses.replace(mine, output_token_ids=mine.output_token_ids[:1], engine_log_probs=None)


def blank(reader: ImageReader, tokens: Sequence[int]) -> Sample | None:
    """A sample with an empty image, for iterations in which no rank has any.

    FSDP2 cannot accumulate gradients over micro-batches before every layer was in use once.

    Args:
        reader: makes images what the model sees.
        tokens: those that stand for media, that for images first; without any there is no such sample.
    """
    if not tokens:
        return None
    from PIL import Image

    seen = reader([Image.new("RGB", (_SIDE, _SIDE))])
    prompt = (tokens[0],) * reader.tokens(seen, 1)
    return Sample(prompt="", response="", prompt_token_ids=(0, *prompt), output_token_ids=(0,), images=seen)
