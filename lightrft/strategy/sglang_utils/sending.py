"""Buckets of weights as SGLang takes them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightrft.errors import WeightSyncError

if TYPE_CHECKING:
    import torch

__all__ = ["check", "flattened", "serialized"]


def flattened(sglang: Any, bucket: Sequence[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    """All tensors of ``bucket`` in one of bytes, with what is needed to find them there.

    Large elements come first, so that each tensor begins where its dtype may.
    """
    ordered = sorted(bucket, key=lambda each: -each[1].element_size())
    cls = importlib.import_module(f"{sglang.__name__}.srt.weight_sync.tensor_bucket").FlattenedTensorBucket
    flat = cls(named_tensors=ordered)
    return {"flattened_tensor": flat.get_flattened_tensor(), "metadata": flat.get_metadata()}


def serialized(sglang: Any, flat: dict[str, Any]) -> bytes:
    """A handle by which one process reads ``flat``, once, as long as it is kept here."""
    serializer = importlib.import_module(f"{sglang.__name__}.srt.utils").MultiprocessingSerializer
    payload: bytes = serializer.serialize(flat)
    return payload


def check(result: Any, what: str) -> None:
    """What SGLang returns of an update says whether it went well; it does not raise.

    Raises:
        WeightSyncError: it did not.
    """
    well, message = result[:2] if isinstance(result, tuple) else (result.success, result.message)
    if not well:
        raise WeightSyncError(f"SGLang refused {what}: {message}")
