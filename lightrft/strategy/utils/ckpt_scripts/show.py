"""What checkpoints a folder has: ``python -m lightrft.strategy.utils.ckpt_scripts.show FOLDER``."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.utils.checkpoint_info import INFO_FILE, CheckpointInfo
from lightrft.strategy.utils.checkpoint_store import CheckpointStore, check_complete

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["show"]


def show(folder: Path) -> str:
    """Text about a ``save_dir`` or one checkpoint: a line for each checkpoint, oldest first.

    Raises:
        ConfigError: there is none.
        CheckpointError: ``folder`` is a checkpoint that is incomplete.
    """
    if (folder / INFO_FILE).is_file():
        return _table([check_complete(folder)], {})
    store = CheckpointStore(folder)
    infos = store.infos() if folder.is_dir() else []
    if not infos:
        raise ConfigError(f"{folder} holds no checkpoint that lightrft wrote: expected a save_dir, or a folder in one")
    return _table(infos, {info.tag: _remarks(folder, info, store.latest()) for info in infos})


def _remarks(folder: Path, info: CheckpointInfo, latest: str | None) -> str:
    found = ["latest"] if info.tag == latest else []
    try:
        check_complete(folder / info.tag)
    except CheckpointError as error:
        found.append(f"damaged: {error}")
    return ", ".join(found)


def _table(infos: list[CheckpointInfo], remarks: dict[str, str]) -> str:
    rows = [("tag", "backend", "steps", "world size", "GB", "saved at", "")]
    rows += [
        (
            info.tag,
            info.backend,
            str(info.steps),
            str(info.world_size),
            f"{info.bytes / 10**9:.3f}",
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info.saved_at)),
            remarks.get(info.tag, ""),
        )
        for info in infos
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    from lightrft.strategy.utils.ckpt_scripts.command import script

    sys.exit(script(["show", *sys.argv[1:]]))
