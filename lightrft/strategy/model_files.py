"""What the files of a model say about it: names and shapes of its weights, sizes, special tokens."""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ModelFiles"]

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")

_HEAD = "lm_head.weight"

_NOT_WEIGHTS = ("rotary_emb.inv_freq",)
"""Endings of names in old checkpoints that are no parameters: no trainer sends them."""

_FLOATING = ("F", "BF")
"""Beginnings of the names of floating-point dtypes."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFiles:
    """What is known of a model without loading it. ``None`` where the files do not say.

    Attributes:
        shapes: of the weights, by their names in the checkpoint.
        whole_numbers: names of those that are no floating-point numbers.
        tied: whether the output layer is the embedding.
        vocab_size: number of token ids that the model has.
        max_positions: most tokens that the model was made for.
        image_token, video_token: token ids that stand for one image or video in a prompt.
        sees: whether it takes images or videos.
        has_tokenizer: whether a tokenizer lies beside it.
    """

    shapes: Mapping[str, Shape] | None = None
    whole_numbers: frozenset[str] = frozenset()
    tied: bool = False
    vocab_size: int | None = None
    max_positions: int | None = None
    image_token: int | None = None
    video_token: int | None = None
    sees: bool | None = None
    has_tokenizer: bool | None = None

    @classmethod
    def of(cls, model: str) -> ModelFiles:
        """Of a folder, or of a name whose files were downloaded before; nothing is downloaded here."""
        folder = _folder(model)
        config = _json(folder / "config.json") if folder is not None else None
        if folder is None or config is None:
            return cls()
        text = {**config, **(config.get("text_config") or {})}
        weights = _weights(folder)
        return cls(
            shapes={name: shape for name, (shape, _) in weights.items()} or None,
            whole_numbers=frozenset(name for name, (_, floating) in weights.items() if not floating),
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vocab_size=text.get("vocab_size"),
            max_positions=text.get("max_position_embeddings"),
            image_token=config.get("image_token_id", config.get("image_token_index")),
            video_token=config.get("video_token_id", config.get("video_token_index")),
            sees="vision_config" in config,
            has_tokenizer=any((folder / name).is_file() for name in _TOKENIZERS),
        )

    def told_shapes(self) -> dict[str, Shape]:
        """Names and shapes of all weights that may be sent: an output layer too that is the embedding."""
        return {**(self.shapes or {}), **self.copies_of_the_embedding()}

    def copies_of_the_embedding(self) -> dict[str, Shape]:
        """The output layer if it is tied to the embedding: it may be sent or not, whether the checkpoint has it."""
        shapes = self.shapes or {}
        embedding = next((name for name in shapes if name.endswith("embed_tokens.weight")), None)
        if not self.tied or embedding is None:
            return {}
        heads = [name for name in shapes if name.endswith(_HEAD)]
        return dict.fromkeys(heads or [_HEAD], shapes[embedding])


def _folder(model: str) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True))
    except (ImportError, OSError, ValueError):  # its errors of missing files and of wrong names are of these classes
        return None


def _json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else None


def _weights(folder: Path) -> dict[str, tuple[Shape, bool]]:
    """Shape of each weight, and whether it is of floating-point numbers; empty where no file tells.

    Safetensors files are preferred to those of ``torch.save``, as engines do.
    """
    found: dict[str, tuple[Shape, bool]] = {}
    for file in _files(folder, "*.safetensors", "model.safetensors.index.json"):
        found |= _head(file)
    if not found:
        for file in _files(folder, "pytorch_model*.bin", "pytorch_model.bin.index.json"):
            found |= _saved_by_torch(file)
    return {name: entry for name, entry in found.items() if not name.endswith(_NOT_WEIGHTS)}


def _files(folder: Path, pattern: str, index: str) -> list[Path]:
    """Those of the model: what its index names, as other files may lie beside them, or all of a pattern."""
    told = _json(folder / index)
    if told is None:
        return sorted(folder.glob(pattern))
    return [folder / name for name in sorted(set(told["weight_map"].values()))]


def _head(file: Path) -> dict[str, tuple[Shape, bool]]:
    """What one file says of its weights: eight bytes tell how long the JSON is that follows (safetensors format)."""
    with file.open("rb") as opened:
        (length,) = struct.unpack("<Q", opened.read(8))
        head = json.loads(opened.read(length))
    return {
        name: (tuple(entry["shape"]), entry["dtype"].startswith(_FLOATING))
        for name, entry in head.items()
        if name != "__metadata__"
    }


def _saved_by_torch(file: Path) -> dict[str, tuple[Shape, bool]]:
    """The same of a file of ``torch.save``, whose weights stay where they are."""
    import torch

    held = torch.load(file, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(file))
    return {
        name: (tuple(one.shape), one.is_floating_point()) for name, one in held.items() if isinstance(one, torch.Tensor)
    }
