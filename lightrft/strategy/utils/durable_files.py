"""Files and folders that survive a crash: written, then synced, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

__all__ = ["delete", "file_sizes", "sync_folder", "sync_tree", "write_file"]


def write_file(path: Path, contents: bytes) -> None:
    """Write a file, and return when it is on the disk."""
    with path.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Return when the names in a folder are on the disk; where the file system cannot do that, at once."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file below a folder, by its name relative to the folder, in order of the names."""
    found = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(found)}


def sync_tree(folder: Path) -> None:
    """Return when everything below a folder is on the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def delete(path: Path) -> None:
    """Delete a file, or a folder and all below it; what is not there is fine."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
