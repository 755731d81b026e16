"""Output of which every line says which rank printed it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

from lightrft.sim.current import current_task

__all__ = ["tagged_output"]

_RETURN = "\r"


class TaggedStream:
    """Stands before a text stream and writes whole lines only, each behind ``[rank N]``.

    A line belongs to the rank on whose thread it is written, so that a logger which all ranks share is tagged right.
    The part of a line that has no end yet is kept for each rank. Text that a carriage return overwrites is dropped.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._partial: dict[int, str] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write the lines that ``text`` completes, and keep the rest."""
        task = current_task()
        if task is None:
            return self._stream.write(text)
        rank = task.rank.index
        *lines, rest = (self._partial.pop(rank, "") + text).split("\n")
        self._write_lines(rank, lines)
        if rest:
            self._partial[rank] = _visible(rest)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of ``lines``."""
        for line in lines:
            self.write(line)

    def finish(self) -> None:
        """End the lines that have no end yet."""
        for rank in sorted(self._partial):
            self._write_lines(rank, [self._partial[rank]])
        self._partial.clear()
        self._stream.flush()

    def finish_rank(self, rank: int) -> None:
        """As :meth:`finish`, for one rank."""
        if rank in self._partial:
            self._write_lines(rank, [self._partial.pop(rank)])

    def _write_lines(self, rank: int, lines: list[str]) -> None:
        tagged = "".join(f"[rank {rank}] {_visible(line).removesuffix(_RETURN)}\n" for line in lines)
        if tagged:
            self._stream.write(tagged)


def _visible(line: str) -> str:
    """What a terminal would show of a line, so that a progress bar does not fill the memory."""
    return line[:-1].rpartition(_RETURN)[2] + line[-1:]


@contextmanager
def tagged_output(function: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Tag what ranks print while they run the function that this gives, which does what ``function`` does.

    ``sys.stdout`` and ``sys.stderr`` are replaced in this process, from where new ranks take them.
    """
    stdout, stderr = sys.stdout, sys.stderr
    tagged = TaggedStream(stdout), TaggedStream(stderr)

    def run() -> None:
        try:
            function()
        finally:
            task = current_task()
            for stream in tagged:
                stream.finish_rank(task.rank.index if task is not None else 0)

    sys.stdout, sys.stderr = (cast("TextIO", stream) for stream in tagged)
    try:
        yield run
    finally:
        sys.stdout, sys.stderr = stdout, stderr
        for stream in tagged:
            stream.finish()
