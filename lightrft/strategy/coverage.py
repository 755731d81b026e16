"""Whether the weights of an update are those of the checkpoint that an engine was started from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lightrft.errors import CheckpointError, WeightSyncError
from lightrft.strategy.utils.ckpt_scripts.hf_reader import opened, weight_files
from lightrft.strategy.utils.saving import OUTSIDE

__all__ = ["Coverage", "checkpoint_shapes"]

_MOST_NAMED = 5

Shape = tuple[int, ...]


def checkpoint_shapes(model: str) -> dict[str, Shape] | None:
    """Names and shapes of the weights of a model, as its checkpoint has them.

    Args:
        model: a folder of Hugging Face, or the name of a model that was loaded from there before.

    Returns:
        ``None`` if the checkpoint is not found, or is not in safetensors: nothing tells names then.
    """
    folder = _folder(model)
    if folder is None:
        return None
    shapes: dict[str, Shape] = {}
    try:
        for file in weight_files(folder):
            if file.name == OUTSIDE:
                continue
            with opened(file) as weights:
                shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except CheckpointError:
        return None
    return shapes


def may_be_absent(model: str, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """Weights that an update may have or lack, with their shapes: an output layer tied to the embedding."""
    folder = _folder(model)
    embedding = next((name for name in shapes if name.endswith("embed_tokens.weight")), None)
    if folder is None or embedding is None or not _is_tied(folder, shapes):
        return {}
    heads = [name for name in shapes if name.endswith("lm_head.weight")]
    return dict.fromkeys(heads or ["lm_head.weight"], shapes[embedding])


class Coverage:
    """Counts the weights of one update.

    Args:
        shapes: of the weights that are needed, by name; ``None`` if they are not known: then only what comes twice is
            found.
        optional: of weights that may come as well.
    """

    def __init__(self, shapes: Mapping[str, Shape] | None, optional: Mapping[str, Shape]) -> None:
        self._shapes = shapes
        self._optional = optional
        self._seen: set[str] = set()
        self._problems: dict[str, list[str]] = {}

    def fits(self, name: str, shape: Shape) -> bool:
        """Whether a weight may be loaded; if not, ``check`` will name it."""
        expected = None
        if name in self._seen:
            self._note("sent twice", name)
            return False
        self._seen.add(name)
        if self._shapes is None:
            return True
        expected = self._shapes.get(name, self._optional.get(name))
        if expected is None:
            self._note("unexpected", name)
        elif expected != tuple(shape):
            self._note("of another shape", f"{name} {tuple(shape)}, expected {expected}")
        return expected == tuple(shape)

    def check(self) -> None:
        """All weights have come, and no others.

        Raises:
            WeightSyncError: they have not; the message names them.
        """
        for name in sorted(set(self._shapes or ()) - set(self._optional) - self._seen):
            self._note("missing", name)
        if self._problems:
            found = "; ".join(f"{kind}: {_some(names)}" for kind, names in self._problems.items())
            raise WeightSyncError(
                f"the weights that were sent are not those of the engine's model: {found}. Check that actor and engine "
                "are of the same model, and how names are mapped"
            )

    def _note(self, kind: str, what: str) -> None:
        self._problems.setdefault(kind, []).append(what)


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _folder(model: str) -> Path | None:
    if Path(model).is_dir():
        return Path(model)
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, local_files_only=True))
    except (ImportError, OSError, ValueError):  # its errors are of these classes
        return None


def _is_tied(folder: Path, shapes: Mapping[str, Shape]) -> bool:
    """As the configuration says; where it does not, a checkpoint without output layer has a tied one."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    for part in (config, config.get("text_config") or {}):
        if "tie_word_embeddings" in part:
            return bool(part["tie_word_embeddings"])
    return not any(name.endswith("lm_head.weight") for name in shapes)
