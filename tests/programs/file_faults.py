"""The n-th call to the file system fails, or the machine stops there.

Calls are counted below one folder. When the machine stops, every later call stops too, so that nothing is tidied up,
and a file that was not synced since it was last written keeps only half of its bytes.
"""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

EVENTS = {"open", "os.listdir", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.scandir"}


class MachineStopped(BaseException):
    """Nothing runs any more."""


class Faults:
    """Watches a folder, and strikes at one of the calls.

    Args:
        folder: whose calls are counted.
        at: number of the call, from 0; ``None`` for none.
        stops: whether the machine stops there; otherwise that one call raises ``OSError``.
    """

    def __init__(self, folder, at, *, stops):
        self.folder = Path(folder)
        self.at = at
        self.stops = stops
        self.calls = []
        self.struck = False
        self.synced = set()

    def written(self):
        return {(status.st_ino, status.st_mtime_ns): path for path, status in self._files()}

    def _files(self):
        return [(path, path.stat()) for path in self.folder.rglob("*") if path.is_file()]

    def happens(self, event, path):
        if self.struck and self.stops:
            raise MachineStopped
        self.calls.append((event, path))
        if len(self.calls) - 1 == self.at:
            self.struck = True
            if self.stops:
                self._lose_what_is_not_synced()
                raise MachineStopped
            raise OSError(28, "No space left on device (injected)", path)

    def _lose_what_is_not_synced(self):
        with unwatched():
            for key, path in self.written().items():
                if key not in self.synced:
                    os.truncate(path, path.stat().st_size // 2)

    def counts(self, path):
        return not os.path.isabs(path) or Path(path).is_relative_to(self.folder)


_watching = []


def _hook(event, args):
    if _watching and event in EVENTS and isinstance(args[0], str | os.PathLike):
        path = os.fspath(args[0])
        if _watching[-1] is not None and _watching[-1].counts(path):
            _watching[-1].happens(event, path)


_installed = []


@contextmanager
def unwatched():
    _watching.append(None)
    try:
        yield
    finally:
        _watching.pop()


@contextmanager
def fault(folder, at, *, stops):
    """Faults below ``folder`` while the block runs; a stop of the machine ends here."""
    if not _installed:
        sys.addaudithook(_hook)  # there is no way to take it off
        _installed.append(True)
    faults = Faults(folder, at, stops=stops)
    faults.synced = set(faults.written())
    fsync = os.fsync

    def watched_fsync(descriptor):
        with unwatched():
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        if faults.counts(path):
            faults.happens("os.fsync", path)
        fsync(descriptor)
        status = os.fstat(descriptor)
        faults.synced.add((status.st_ino, status.st_mtime_ns))

    _watching.append(faults)
    os.fsync = watched_fsync
    try:
        yield faults
    except MachineStopped:
        pass
    finally:
        os.fsync = fsync
        _watching.pop()
