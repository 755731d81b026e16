"""``sglang.srt.weight_sync.tensor_bucket``, and the serializer of ``sglang.srt.utils``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["FlattenedTensorBucket", "FlattenedTensorMetadata", "MultiprocessingSerializer"]

_alive: dict[bytes, Any] = {}
"""What was serialised and not read yet."""

_numbers = itertools.count()


class MultiprocessingSerializer:
    """Hands an object to the engine without copying its tensors: what is read is what they hold then, once."""

    @staticmethod
    def serialize(obj: Any, output_str: bool = False) -> bytes | str:
        """A handle to ``obj``."""
        handle = f"lightrft-fake-payload-{next(_numbers)}"
        _alive[handle.encode()] = obj
        return handle if output_str else handle.encode()

    @staticmethod
    def deserialize(data: bytes | str) -> Any:
        """The object; a handle is good for one reading.

        Raises:
            ValueError: it was read before, or is none.
        """
        handle = data.encode() if isinstance(data, str) else data
        if handle not in _alive:
            raise ValueError("a payload was read twice, or is none: serialise one for each rank of the engine")
        return _alive.pop(handle)


@dataclass
class FlattenedTensorMetadata:
    """Where a tensor is in a bucket, in bytes, of which ``numel`` is the number."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start_idx: int
    end_idx: int
    numel: int


class FlattenedTensorBucket:
    """Tensors one after the other in one of bytes.

    Args:
        named_tensors: to be flattened.
        flattened_tensor: or what was, with
        metadata: which tells where each is.
    """

    supports_multi_dtypes = True

    def __init__(
        self,
        named_tensors: list[tuple[str, Tensor]] | None = None,
        flattened_tensor: Tensor | None = None,
        metadata: list[FlattenedTensorMetadata] | None = None,
    ) -> None:
        if named_tensors is not None:
            flattened_tensor, metadata = _flattened(named_tensors)
        if flattened_tensor is None or metadata is None:
            raise ValueError("expected named_tensors, or flattened_tensor and metadata")
        self.flattened_tensor = flattened_tensor
        self.metadata = metadata

    def get_flattened_tensor(self) -> Tensor:
        """The bytes."""
        return self.flattened_tensor

    def get_metadata(self) -> list[FlattenedTensorMetadata]:
        """Where each is."""
        return self.metadata

    def reconstruct_tensors(self) -> list[tuple[str, Tensor]]:
        """The tensors, as views."""
        return [
            (one.name, self.flattened_tensor[one.start_idx : one.end_idx].view(one.dtype).reshape(one.shape))
            for one in self.metadata
        ]


def _flattened(tensors: Sequence[tuple[str, Tensor]]) -> tuple[Tensor, list[FlattenedTensorMetadata]]:
    metadata = []
    first = 0
    for name, tensor in tensors:
        end = first + tensor.numel() * tensor.itemsize
        if first % tensor.itemsize:
            raise RuntimeError(f"{name} begins at byte {first}, where no {tensor.dtype} can: larger elements go first")
        metadata.append(FlattenedTensorMetadata(name, tensor.shape, tensor.dtype, first, end, end - first))
        first = end
    parts = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for _, tensor in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8), metadata


for _each in (FlattenedTensorBucket, FlattenedTensorMetadata):
    _each.__module__ = "sglang.srt.weight_sync.tensor_bucket"
MultiprocessingSerializer.__module__ = "sglang.srt.utils.common"
