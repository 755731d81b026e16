"""Finding out what is to be converted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.utils.checkpoint_info import INFO_FILE, LATEST_FILE, CheckpointInfo, read_info
from lightrft.strategy.utils.checkpoint_store import CheckpointStore, check_complete
from lightrft.strategy.utils.ckpt_scripts.hf_reader import INDEX, HFContents
from lightrft.strategy.utils.saving import OUTSIDE, WEIGHTS

if TYPE_CHECKING:
    from pathlib import Path

    from lightrft.strategy.utils.ckpt_scripts.contents import Contents

__all__ = ["KINDS", "Source", "contents_of", "is_checkpoint_folder", "open_source"]

KINDS = ("hf", "fsdp", "deepspeed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is converted.

    Attributes:
        folder: with the files.
        kind: one of ``KINDS``.
        info: what a checkpoint says of itself; ``None`` for a folder of Hugging Face.
        contents: of the folder.
    """

    folder: Path
    kind: str
    info: CheckpointInfo | None
    contents: Contents


def open_source(folder: Path, tag: str | None) -> Source:
    """What is in ``folder``: a checkpoint, a ``save_dir`` with checkpoints, or weights of Hugging Face.

    Args:
        folder: that.
        tag: which checkpoint of a ``save_dir``; ``None`` for the one that ``latest`` names.

    Raises:
        ConfigError: there is nothing that could be converted, or the tag is of another checkpoint.
        CheckpointError: it is incomplete or damaged.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder: expected a checkpoint, a save_dir with some, or a Hugging Face model"
        )
    if _is_hf(folder):
        if tag is not None:
            raise ConfigError(f"{folder} is a Hugging Face model, which has no checkpoint {tag!r}: leave --tag out")
        return Source(folder=folder, kind="hf", info=None, contents=HFContents(folder))
    place = folder if (folder / INFO_FILE).is_file() else _in_save_dir(folder, tag)
    info = check_complete(place)
    if tag is not None and tag != info.tag:
        raise ConfigError(f"{folder} is the checkpoint {info.tag!r}, not {tag!r}: leave --tag out, or pass its parent")
    if info.backend not in KINDS:
        raise ConfigError(
            f"{place} was written by the {info.backend} backend: only those of fsdp and deepspeed can be converted"
        )
    return Source(folder=place, kind=info.backend, info=info, contents=contents_of(info.backend, place))


def contents_of(kind: str, folder: Path) -> Contents:
    """What a folder of a known kind holds.

    Raises:
        CheckpointError: it is incomplete or damaged.
    """
    if kind == "hf":
        return HFContents(folder)
    if kind == "fsdp":
        from lightrft.strategy.utils.ckpt_scripts.fsdp_reader import FSDPContents

        return FSDPContents(folder)
    from lightrft.strategy.extras import naming_extras

    with naming_extras("reading a checkpoint of DeepSpeed"):
        import deepspeed  # noqa: F401 - the files hold objects of it
    from lightrft.strategy.utils.ckpt_scripts.deepspeed_reader import DeepSpeedContents

    return DeepSpeedContents(folder)


def is_checkpoint_folder(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint, has checkpoints, or is a Hugging Face model."""
    if (folder / INFO_FILE).is_file() or _is_hf(folder):
        return True
    return any((entry / INFO_FILE).is_file() for entry in folder.iterdir())


def _is_hf(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (WEIGHTS, INDEX, OUTSIDE, "config.json"))


def _in_save_dir(folder: Path, tag: str | None) -> Path:
    store = CheckpointStore(folder)
    if tag is None and not (folder / LATEST_FILE).is_file() and not store.infos():
        files = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise ConfigError(
            f"{folder} holds no checkpoint that lightrft wrote ({INFO_FILE}), and no {WEIGHTS} or {INDEX}; it has "
            f"{files}"
        )
    path = store.find(tag)
    if read_info(path).tag != path.name and not path.name.startswith("."):
        raise CheckpointError(f"{path} was written as {read_info(path).tag!r}: give the folder its name back")
    return path
