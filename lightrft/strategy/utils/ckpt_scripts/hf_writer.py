"""Writing a folder for ``from_pretrained``."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

from lightrft.errors import CheckpointError
from lightrft.strategy.extras import naming_extras
from lightrft.strategy.utils.ckpt_scripts.contents import Contents, Place
from lightrft.strategy.utils.ckpt_scripts.hf_reader import INDEX
from lightrft.strategy.utils.saving import OUTSIDE, WEIGHTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from lightrft.strategy.utils.ckpt_scripts.progress import Progress

__all__ = ["CONFIG", "write"]

CONFIG = "config.json"
LARGEST_FILE = 5 * 10**9
"""Bytes of one file of weights; it is in memory while it is written."""

_COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")


def write(contents: Contents, folder: Path, progress: Progress, *, model: Path | None, outside: Iterable[str]) -> None:
    """Write the weights, and the configuration and the tokenizer of another folder.

    Args:
        contents: of which the weights are written.
        folder: exists.
        progress: is told.
        model: the other folder; ``None`` for weights alone.
        outside: names of weights that are none of the model itself.
    """
    apart = set(outside)
    names = [place.name for place in contents.specs if not place.key]
    files = list(_split(contents, [name for name in names if name not in apart]))
    weight_map: dict[str, str] = {}
    for number, part in enumerate(files, 1):
        file = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(contents, part, folder / file, progress)
        weight_map |= dict.fromkeys(part, file)
    if len(files) > 1:
        total = sum(contents.specs[Place(name)].bytes for name in weight_map)
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if apart:
        _write_file(contents, sorted(apart), folder / OUTSIDE, progress)
    if model is not None:
        _copy(model, folder, _dtype_of(contents))


def _split(contents: Contents, names: list[str]) -> Iterator[list[str]]:
    part: list[str] = []
    size = 0
    for name in names:
        bytes_of_one = contents.specs[Place(name)].bytes
        if part and size + bytes_of_one > LARGEST_FILE:
            yield part
            part, size = [], 0
        part.append(name)
        size += bytes_of_one
    yield part


def _write_file(contents: Contents, names: Iterable[str], file: Path, progress: Progress) -> None:
    with naming_extras("writing safetensors"):
        from safetensors.torch import save_file
    weights = {}
    for name in names:
        weights[name] = contents.read(Place(name)).contiguous()
        progress.add(contents.specs[Place(name)].bytes)
    save_file(weights, file, metadata={"format": "pt"})


def _dtype_of(contents: Contents) -> str | None:
    floating = (spec.dtype for spec in contents.specs.values() if spec.dtype.is_floating_point)
    return next((str(dtype).removeprefix("torch.") for dtype in floating), None)


def _copy(model: Path, folder: Path, dtype: str | None) -> None:
    """The configuration with the dtype of the weights, the tokenizer, and the code of the model."""
    for file in sorted(model.iterdir()):
        weights = file.name == INDEX or file.name.endswith(".index.json")
        if file.is_file() and file.suffix in _COPIED and not weights and file.name != CONFIG:
            shutil.copyfile(file, folder / file.name)
    try:
        config = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model / CONFIG} cannot be read ({error}): pass the folder of a model") from error
    _write_json(folder / CONFIG, _with_dtype(config, dtype))


def _with_dtype(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    return {**config, key: dtype} if dtype is not None else dict(config)


def _write_json(file: Path, contents: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")
