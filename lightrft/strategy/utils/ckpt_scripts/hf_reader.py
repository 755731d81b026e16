"""What a folder of Hugging Face holds: weights in safetensors."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightrft.errors import CheckpointError
from lightrft.strategy.extras import naming_extras
from lightrft.strategy.utils.ckpt_scripts.contents import Contents, Place, Spec
from lightrft.strategy.utils.saving import OUTSIDE, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["INDEX", "HFContents", "weight_files"]

INDEX = f"{WEIGHTS}.index.json"
"""Which file holds which weight, where there are several files."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class HFContents(Contents):
    """Weights, read one at a time.

    Args:
        folder: with ``model.safetensors``, or several files and their index.

    Raises:
        CheckpointError: there are none, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Path] = {}
        self.specs = {}
        for file in weight_files(folder):
            with opened(file) as weights:
                for name in weights.keys():  # noqa: SIM118 - it is no dict
                    part = weights.get_slice(name)
                    self._files[name] = file
                    self.specs[Place(name)] = Spec(tuple(part.get_shape()), _dtype(file, part.get_dtype()))

    def read(self, place: Place) -> torch.Tensor:
        """As in ``Contents``."""
        with opened(self._files[place.name]) as weights:
            found: torch.Tensor = weights.get_tensor(place.name)
        return found


def weight_files(folder: Path) -> list[Path]:
    """The files with weights, without those outside of the model itself but for ``outside.safetensors``.

    Raises:
        CheckpointError: there are none, or one is missing.
    """
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged ({error}): get the folder anew") from error
    elif (folder / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise CheckpointError(
            f"{folder} has neither {WEIGHTS} nor {INDEX}: expected the folder of save_pretrained, with safetensors"
        )
    names += [OUTSIDE] if (folder / OUTSIDE).is_file() else []
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:5])}, which its {INDEX} names: get the folder anew")
    return [folder / name for name in names]


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A file of safetensors.

    Raises:
        CheckpointError: it is damaged.
    """
    with naming_extras("reading safetensors"):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): it is damaged, get it anew") from error


def _dtype(file: Path, name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise CheckpointError(f"{file} has weights in {name}: expected any of {', '.join(_DTYPES)}")
    return _DTYPES[name]
