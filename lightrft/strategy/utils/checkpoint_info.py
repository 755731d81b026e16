"""What a complete checkpoint says of itself: the file ``lightrft.json``, and the names that a checkpoint may have."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lightrft.errors import CheckpointError, ConfigError

__all__ = ["FORMAT_VERSION", "INFO_FILE", "LATEST_FILE", "CheckpointInfo", "check_tag", "read_info"]

FORMAT_VERSION = 1
INFO_FILE = "lightrft.json"
LATEST_FILE = "latest"
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+@,-]*")
_LONGEST_TAG = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """The contents of ``lightrft.json``; a folder that has this file is complete and was written by lightrft."""

    tag: str
    """Name of the folder when it was written."""
    backend: str
    """Who wrote the weights: ``fsdp`` or ``deepspeed``, say."""
    world_size: int
    """Number of ranks that wrote it."""
    steps: int
    """Optimizer steps until then."""
    sequence: int
    """Checkpoints of one ``save_dir`` are numbered in the order in which they are saved, whatever the clock says."""
    saved_at: float
    """Seconds since 1970."""
    save_latest: bool
    """Whether ``latest`` was to point to it."""
    files: dict[str, int]
    """Bytes of every file but ``lightrft.json``, by its name relative to the folder."""
    pickled: tuple[str, ...]
    """Files with objects that ``torch.load(weights_only=True)`` refuses."""
    same_random_state: tuple[str, ...]
    """Random generators whose state was the same on all ranks."""

    @property
    def bytes(self) -> int:
        """Bytes of all files together."""
        return sum(self.files.values())

    def to_json(self) -> str:
        """Text for ``lightrft.json``."""
        return json.dumps({"format_version": FORMAT_VERSION, "bytes": self.bytes, **asdict(self)}, indent=1) + "\n"


def read_info(folder: Path) -> CheckpointInfo:
    """Read ``lightrft.json`` of a checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format; the message names it.
    """
    file = folder / INFO_FILE
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is no complete checkpoint: it has no {INFO_FILE}, which is written last; "
            "load another one, or delete the folder"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): load another checkpoint") from error
    return _parse(file, entries)


def _parse(file: Path, entries: Any) -> CheckpointInfo:
    version = entries.get("format_version") if isinstance(entries, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {version!r}, expected {FORMAT_VERSION}: "
            "load it with the release of lightrft that wrote it"
        )
    kinds: dict[str, Any] = {"files": dict, "pickled": list, "same_random_state": list, "saved_at": (int, float)}
    kinds |= {"tag": str, "backend": str, "save_latest": bool}
    values: dict[str, Any] = {}
    for name in (each.name for each in fields(CheckpointInfo)):
        if not isinstance(entries.get(name), kinds.get(name, int)):
            raise CheckpointError(f"{file} is damaged: {name} is {entries.get(name)!r}; load another checkpoint")
        values[name] = tuple(entries[name]) if kinds.get(name) is list else entries[name]
    if not all(type(size) is int for size in values["files"].values()):
        raise CheckpointError(f"{file} is damaged: files has sizes that are no numbers; load another checkpoint")
    return CheckpointInfo(**values)


def check_tag(tag: object) -> str:
    """The tag, if it can name a folder that is a child of ``save_dir`` everywhere.

    Raises:
        ConfigError: it cannot.
    """
    safe = isinstance(tag, str) and _TAG.fullmatch(tag) and len(tag) <= _LONGEST_TAG
    if not isinstance(tag, str) or not safe or tag.lower() == LATEST_FILE:
        raise ConfigError(
            f"tag={tag!r} cannot name a checkpoint: expected at most {_LONGEST_TAG} letters, digits and ._=+@,- "
            f"with no dot or sign in front, and not {LATEST_FILE!r}, such as 'global_step100'"
        )
    return tag
