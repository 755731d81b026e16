"""The checkpoints in one folder, as one process sees and changes them: begin, commit, find, rotate, clean up.

A checkpoint is written in a hidden folder beside its place (:mod:`lightrft.strategy.utils.hidden_names`), which is
renamed when it is complete. A process that dies leaves hidden ones behind. A later save of the same job, or of any
process on the same machine, deletes them if the process that they name is gone; a ``replaced`` folder whose tag is
missing is put back first. Readers change nothing: they find a ``replaced`` folder where the tag itself is missing.
"""

from __future__ import annotations

import os
import time
import warnings
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.utils.checkpoint_info import INFO_FILE, LATEST_FILE, CheckpointInfo, check_tag, read_info
from lightrft.strategy.utils.durable_files import delete, file_sizes, sync_folder, sync_tree, write_file
from lightrft.strategy.utils.hidden_names import Hidden, Owner

__all__ = ["GB", "CheckpointStore", "check_complete"]

GB = 10**9


class CheckpointStore:
    """Checkpoints in ``save_dir``; only one process of a job may call what changes something.

    Args:
        save_dir: the folder; made when it is first needed.
    """

    def __init__(self, save_dir: Path) -> None:
        self.save_dir = save_dir
        self.me = Owner.me()

    # -- what is there ------------------------------------------------------------------------------------------

    def infos(self) -> list[CheckpointInfo]:
        """What the complete checkpoints say of themselves, oldest first.

        Folders that were not written by lightrft, copied, renamed or damaged since are left out.
        """
        found = []
        for entry in self._entries():
            path = Path(entry.path)
            folder = entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
            if not folder or not (path / INFO_FILE).is_file():
                continue
            try:
                info = read_info(path)
            except CheckpointError:
                continue
            if info.tag == path.name:
                found.append(info)
        return sorted(found, key=lambda info: (info.sequence, info.saved_at, info.steps))

    def latest(self) -> str | None:
        """The tag in the file ``latest``; ``None`` without that file.

        Raises:
            CheckpointError: the file holds no tag.
        """
        file = self.save_dir / LATEST_FILE
        try:
            return check_tag(file.read_text(encoding="utf-8").strip())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file} holds no tag of a checkpoint ({error}): {self._pass_one()}") from error

    def find(self, tag: str | None) -> Path:
        """Folder of the checkpoint ``tag``, or of the one that ``latest`` names; checked to be complete.

        Without a file ``latest`` it is the newest that was saved with ``save_latest=True``.

        Raises:
            CheckpointError: there is none, or it is incomplete; the message lists what is there.
        """
        if not self.save_dir.is_dir():
            raise CheckpointError(f"{self.save_dir} is no folder: expected the save_dir of an earlier save_ckpt")
        wanted = tag if tag is not None else self.latest() or self._newest()
        if wanted is None:
            raise CheckpointError(f"{self.save_dir} has no file {LATEST_FILE!r}: {self._pass_one()}")
        path = self._place(wanted)
        if path is None:
            because = "" if tag is not None else f", which the file {LATEST_FILE!r} names"
            raise CheckpointError(f"{self.save_dir} has no checkpoint {wanted!r}{because}: {self._pass_one()}")
        try:
            check_complete(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {self._pass_one()}") from error
        return path

    def _newest(self) -> str | None:
        tags = [info.tag for info in self.infos() if info.save_latest]
        return tags[-1] if tags else None

    def _place(self, tag: str) -> Path | None:
        """Where a checkpoint lies: in its place, or set aside by a process that died before the new one took it."""
        if (self.save_dir / tag).is_dir():
            return self.save_dir / tag
        aside = [hidden.path for hidden in self._hidden() if hidden.kind == "replaced" and hidden.tag == tag]
        return next((path for path in aside if (path / INFO_FILE).is_file()), None)

    def _pass_one(self) -> str:
        tags = [info.tag for info in self.infos()]
        return f"complete checkpoints there are {', '.join(tags)}; pass one as tag" if tags else "there is none"

    def _entries(self) -> list[os.DirEntry[str]]:
        if not self.save_dir.is_dir():
            return []
        with os.scandir(self.save_dir) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    def _hidden(self) -> list[Hidden]:
        parsed = (Hidden.parse(Path(entry.path)) for entry in self._entries())
        return [hidden for hidden in parsed if hidden is not None]

    def _hide(self, kind: str, tag: str) -> Path:
        """The hidden name of ``kind`` that is this process's own."""
        return Hidden.path_of(self.save_dir, kind, self.me, tag)

    # -- what changes something ---------------------------------------------------------------------------------

    def begin(self, tag: str) -> Path:
        """Clean up what earlier processes left, and make the hidden folder in which ``tag`` is written.

        Raises:
            ConfigError: the place is taken by something that is no checkpoint of lightrft.
            OSError: the folder cannot be made.
        """
        self.save_dir.mkdir(parents=True, exist_ok=True)
        self._clean_up()
        self._check_place(tag)
        path = self._hide("saving", tag)
        path.mkdir()
        return path

    def _check_place(self, tag: str) -> None:
        place = self.save_dir / tag
        if os.path.lexists(place) and (place.is_symlink() or not (place / INFO_FILE).is_file()):
            raise ConfigError(
                f"{place} exists and is no checkpoint of lightrft: choose another tag or save_dir, or move it away"
            )

    def _clean_up(self) -> None:
        for hidden in self._hidden():
            if not hidden.owner.is_gone_or(self.me):
                continue
            place = self.save_dir / hidden.tag
            if hidden.kind == "replaced" and not os.path.lexists(place) and (hidden.path / INFO_FILE).is_file():
                hidden.path.rename(place)
                sync_folder(self.save_dir)
            else:
                self._delete(hidden.path)

    def discard(self, path: Path) -> None:
        """Delete a folder of :meth:`begin`; one that was committed is gone from there already."""
        self._delete(path)

    def commit(self, path: Path, info: CheckpointInfo) -> None:
        """Make what was written in ``path`` the checkpoint ``info.tag``, and make ``latest`` name it if it is to.

        Args:
            path: the folder of :meth:`begin`.
            info: what is known of it; ``files``, ``sequence`` and ``saved_at`` are filled in here.

        Raises:
            OSError: it could not be done; all is as before.
            CheckpointError: it was done, but may be lost if the machine fails.
        """
        sync_tree(path)
        sequence = 1 + max((known.sequence for known in self.infos()), default=0)
        info = replace(info, files=file_sizes(path), sequence=sequence, saved_at=time.time())
        write_file(path / INFO_FILE, info.to_json().encode())
        sync_folder(path)
        with ExitStack() as undo:
            aside = self._take_place(path, info.tag, undo)
            if info.save_latest:
                written = self._hide("latest", info.tag)
                undo.callback(self._delete, written)
                write_file(written, f"{info.tag}\n".encode())
                written.replace(self.save_dir / LATEST_FILE)
            undo.pop_all()
        try:
            sync_folder(self.save_dir)
        except OSError as error:
            raise CheckpointError(
                f"{self.save_dir / info.tag} is saved, but may not be on the disk: {error}"
            ) from error
        if aside is not None:
            self._retire(aside, info.tag)

    def _take_place(self, path: Path, tag: str, undo: ExitStack) -> Path | None:
        """Rename ``path`` to the tag; where an older one of that tag was set aside to, if there was one."""
        self._check_place(tag)
        place, aside = self.save_dir / tag, None
        if place.exists():
            aside = self._hide("replaced", tag)
            place.rename(aside)
            undo.callback(aside.rename, place)
        path.rename(place)
        undo.callback(place.rename, path)
        sync_folder(self.save_dir)
        return aside

    def rotate(self, newest: str, *, max_num: int | None, max_bytes: float | None) -> None:
        """Delete old checkpoints of lightrft, oldest first, until those left are few and small enough.

        Args:
            newest: tag of the one that was just saved; it is kept, and so is the one that ``latest`` names.
            max_num: how many may be left, kept ones included; ``None`` for any number.
            max_bytes: how many bytes those that are left may have together; ``None`` for any number.
        """
        try:
            self._rotate(newest, max_num, max_bytes)
        except OSError as error:
            warnings.warn(f"the checkpoint {newest!r} is saved, but old ones were not deleted: {error}", stacklevel=2)

    def _rotate(self, newest: str, max_num: int | None, max_bytes: float | None) -> None:
        kept = {newest, self.latest()}
        left = self.infos()
        for info in list(left):
            few = max_num is None or len(left) <= max_num
            if few and _small(left, max_bytes):
                return
            if info.tag not in kept:
                self._retire(self.save_dir / info.tag, info.tag)
                left.remove(info)
        if not _small(left, max_bytes):
            warnings.warn(
                f"the checkpoints that have to stay in {self.save_dir} ({', '.join(each.tag for each in left)}) are "
                f"larger together than max_mem allows: raise max_mem, or use another save_dir",
                stacklevel=2,
            )

    def _retire(self, path: Path, tag: str) -> None:
        """Delete a complete checkpoint: from the first moment on it does not look like one."""
        hidden = self._hide("deleting", tag)
        try:
            path.rename(hidden)
        except OSError as error:
            _warn_kept(path, error)
        else:
            self._delete(hidden)

    def _delete(self, path: Path) -> None:
        try:
            delete(path)
        except OSError as error:
            _warn_kept(path, error)


def check_complete(path: Path) -> CheckpointInfo:
    """What a checkpoint says of itself, if every file has the size that it was saved with.

    Raises:
        CheckpointError: a file is missing, or of another size.
    """
    info = read_info(path)
    found = file_sizes(path)
    for name, size in info.files.items():
        if found.get(name) != size:
            now = f"has {found[name]} bytes" if name in found else "is missing"
            raise CheckpointError(f"{path} is incomplete: {name} {now}, expected {size} bytes")
    return info


def _small(infos: list[CheckpointInfo], max_bytes: float | None) -> bool:
    return max_bytes is None or sum(info.bytes for info in infos) <= max_bytes


def _warn_kept(path: Path, error: OSError) -> None:
    warnings.warn(f"{path} could not be deleted ({error}): delete it by hand", stacklevel=3)
