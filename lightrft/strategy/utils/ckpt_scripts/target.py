"""Where a conversion writes: beside the target, which appears when it is complete."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightrft.errors import ConfigError
from lightrft.strategy.utils.ckpt_scripts.source import is_checkpoint_folder
from lightrft.strategy.utils.durable_files import delete, sync_folder, sync_tree

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["check_target", "replacing"]


def check_target(target: Path, *, overwrite: bool, read: list[Path]) -> None:
    """That ``target`` may be written.

    Args:
        target: a folder.
        overwrite: whether it may be there.
        read: folders that are read; none may be in it, nor it in one of them.

    Raises:
        ConfigError: it may not.
    """
    for folder in read:
        here, there = target.resolve(), folder.resolve()
        if here == there or here.is_relative_to(there) or there.is_relative_to(here):
            raise ConfigError(
                f"the target {target} and {folder}, which is read, are in one another: name a folder apart"
            )
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ConfigError(f"{target} exists: name a folder that does not, or pass --overwrite")
    if target.is_symlink() or not target.is_dir():
        raise ConfigError(f"{target} is no folder: --overwrite replaces folders only")
    if any(target.iterdir()) and not is_checkpoint_folder(target):
        raise ConfigError(
            f"{target} holds something else than checkpoints or a model: move it away, it is not overwritten"
        )


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its place at the end of the block; if the block fails, all is as before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.parent / f".lightrft-converting.{target.name}.{os.getpid()}"
    old = target.parent / f".lightrft-converted.{target.name}.{os.getpid()}"
    delete(new)
    new.mkdir()
    try:
        yield new
        sync_tree(new)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        sync_folder(target.parent)
    finally:
        delete(new)
    delete(old)
