"""Names of what is hidden in a folder of checkpoints: they say what it is, and who made it.

Names that are hidden::

    .lightrft-saving.<job>.<host>.<pid>-<rank>.<tag>     a checkpoint that is being written
    .lightrft-replaced.<job>.<host>.<pid>-<rank>.<tag>   a complete one, set aside until a newer one has taken its place
    .lightrft-deleting.<job>.<host>.<pid>-<rank>.<tag>   one that is being deleted
    .lightrft-latest.<job>.<host>.<pid>-<rank>.<tag>     the file ``latest``, being written
"""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Hidden", "Owner"]

_NAME = re.compile(r"\.lightrft-(saving|replaced|deleting|latest)\.([^.]+)\.([^.]+)\.(\d+)-(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that made something hidden. The texts have no dots."""

    job: str
    host: str
    pid: int
    rank: int

    @classmethod
    def me(cls) -> Owner:
        """This rank of this process; the job is what Slurm or torchrun call it."""
        job = os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or "none"
        return cls(_plain(job), _plain(socket.gethostname()), os.getpid(), int(os.environ.get("RANK") or 0))

    def is_gone_or(self, me: Owner) -> bool:
        """Whether it is the process ``me``, or does not live any more as far as ``me`` can know.

        On this machine the process tells; on another one, only an earlier process of the same job is known to be gone.
        """
        if self.host != me.host:
            return self.job == me.job != "none"
        return self.rank == me.rank if self.pid == me.pid else not _lives(self.pid)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9-]", "_", name)[:40]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


@dataclass(frozen=True, slots=True)
class Hidden:
    """A hidden folder or file, known by its name."""

    path: Path
    kind: str
    owner: Owner
    tag: str

    @classmethod
    def parse(cls, path: Path) -> Hidden | None:
        """What the name of ``path`` says; ``None`` if it is no such name."""
        parts = _NAME.fullmatch(path.name)
        if parts is None:
            return None
        kind, job, host, pid, rank, tag = parts.groups()
        return cls(path, kind, Owner(job, host, int(pid), int(rank)), tag)

    @staticmethod
    def path_of(folder: Path, kind: str, owner: Owner, tag: str) -> Path:
        """The name in ``folder`` that :meth:`parse` takes apart."""
        return folder / f".lightrft-{kind}.{owner.job}.{owner.host}.{owner.pid}-{owner.rank}.{tag}"
