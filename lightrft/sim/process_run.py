"""One run of a process world: N forks, what they print, how far they come, and their end."""

from __future__ import annotations

import codecs
import contextlib
import os
import selectors
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from lightrft.sim.process_rank import EXIT, GO, RAISED, READY, RETURNED, Outcome
from lightrft.sim.process_report import RankEnd, has_main_stack
from lightrft.sim.process_shared import load, memory_file, read_text

if TYPE_CHECKING:
    from lightrft.sim.process_pool import Pool

__all__ = ["Run"]

_SETTLE = 0.3
"""Seconds after the first failure in which other ranks may fail or return as well, before they are looked at."""

_DUMP = 0.5
"""Seconds within which a rank has to write its stack."""


class Stream:
    """What a rank writes to one of its streams, passed on as text."""

    def __init__(self, descriptor: int, target: TextIO, tag: str) -> None:
        os.set_blocking(descriptor, False)
        self.descriptor = descriptor
        self._target = target
        self._tag = tag
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._line = ""

    def pass_on(self) -> bool:
        """Write what has come; whether more can come."""
        while True:
            try:
                content = os.read(self.descriptor, 1 << 16)
            except BlockingIOError:
                return True
            self._write(self._decoder.decode(content, final=not content), end=not content)
            if not content:
                return False

    def finish(self) -> None:
        """Write what is left, and close the stream."""
        if self.pass_on():
            self._write("", end=True)
        os.close(self.descriptor)

    def _write(self, text: str, *, end: bool) -> None:
        if self._tag:  # whole lines only
            *lines, self._line = (self._line + text).split("\n")
            if end and self._line:
                lines.append(self._line)
                self._line = ""
            text = "".join(f"{self._tag}{line}\n" for line in lines)
        if text:
            self._target.write(text)


@dataclass(slots=True)
class Rank:
    """This process's ends of what it shares with a rank."""

    end: RankEnd
    channel: socket.socket
    streams: list[Stream]
    outcome: int
    stacks: int

    @classmethod
    def start(cls, pool: Pool, rank: int, body: int, tag: str) -> Rank:
        """Fork rank ``rank``."""
        channel, theirs = socket.socketpair()
        output, errors = os.pipe(), os.pipe()
        outcome, stacks = memory_file(), memory_file()
        pool.tell([theirs.fileno(), output[1], errors[1], outcome, stacks, body], do="fork", rank=rank)
        theirs.close()
        os.close(output[1])
        os.close(errors[1])
        channel.setblocking(False)
        streams = [Stream(output[0], sys.stdout, tag), Stream(errors[0], sys.stderr, tag)]
        return cls(RankEnd(rank), channel, streams, outcome, stacks)

    def close(self) -> None:
        """Write what is left of the output, and give everything back."""
        for stream in self.streams:
            stream.finish()
        self.channel.close()
        os.close(self.outcome)
        os.close(self.stacks)

    def listen(self) -> bool:
        """Take what the rank has told; whether more can come."""
        try:
            notes = self.channel.recv(16)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        for note in (notes[n : n + 1] for n in range(len(notes))):
            self.end.ready = self.end.ready or note == READY
            self.end.returned = self.end.returned or note == RETURNED
            if note == RAISED:
                self.end.error = self.load_outcome().error
        return bool(notes)

    def say(self, word: bytes) -> None:
        """Tell the rank to go on."""
        with contextlib.suppress(OSError):  # it has died, and that will be noticed
            self.channel.send(word)

    def load_outcome(self) -> Outcome:
        """What the rank has written of its end."""
        outcome: Outcome = load(self.outcome)
        return outcome


class Run:
    """One function on N forks."""

    def __init__(self, pool: Pool, size: int, body: int, *, tagged: bool) -> None:
        self._pool = pool
        self._selector = selectors.DefaultSelector()
        self._selector.register(pool.control, selectors.EVENT_READ, self._hear)
        self.ranks: list[Rank] = []
        self.failed: list[int] = []
        """Ranks that failed, in the order in which that was seen."""
        try:
            for rank in range(size):
                self.ranks.append(Rank.start(pool, rank, body, f"[rank {rank}] " if tagged else ""))
                self._watch(self.ranks[-1])
        except BaseException:
            self.close()
            pool.end_ranks()
            raise

    def _watch(self, rank: Rank) -> None:
        self._selector.register(rank.channel, selectors.EVENT_READ, lambda: self._listen(rank))
        for stream in rank.streams:
            self._selector.register(stream.descriptor, selectors.EVENT_READ, stream.pass_on)

    @property
    def ends(self) -> list[RankEnd]:
        """How far each rank came."""
        return [rank.end for rank in self.ranks]

    def drive(self, limit: float) -> bool:
        """Run the function on all ranks, for ``limit`` seconds at most; whether all went well.

        If not, the stacks of the ranks that still run are taken.
        """
        try:
            for step, word in (("ready", GO), ("returned", EXIT), ("gone", b"")):
                self._wait(limit, lambda step=step: bool(self.failed) or self._all(step))  # type: ignore[misc]
                if self.failed or not self._all(step):
                    self._look()
                    return False
                for rank in self.ranks:
                    rank.say(word)
            return True
        finally:
            self._pool.end_ranks()

    def _all(self, step: str) -> bool:
        return all(getattr(end, step) for end in self.ends)

    def _look(self) -> None:
        """Let others fail as well, then see where the rest is."""
        if self.failed:
            self._wait(_SETTLE, lambda: not any(end.runs for end in self.ends))
        self._pool.tell(do="stacks")
        living = [rank for rank in self.ranks if not rank.end.gone]
        self._wait(_DUMP, lambda: all(has_main_stack(read_text(rank.stacks)) for rank in living), 0.005)
        for rank in self.ranks:
            rank.end.stacks = read_text(rank.stacks)

    def _wait(self, seconds: float, done: Callable[[], bool], step: float = 1.0) -> None:
        """Take what comes until ``done``, for so many seconds; look at least each ``step`` seconds."""
        deadline = time.monotonic() + seconds
        while not done() and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, step)):
                if key.fd in self._selector.get_map() and not key.data():
                    self._selector.unregister(key.fileobj)

    def _listen(self, rank: Rank) -> bool:
        more = rank.listen()
        self._note(rank.end)
        return more

    def _hear(self) -> bool:
        event = self._pool.hear()
        if event["event"] == "died":
            rank = self.ranks[event["rank"]]
            rank.listen()  # its last note may still be waiting
            rank.end.code = event["code"]
            self._note(rank.end)
        return True

    def _note(self, end: RankEnd) -> None:
        if end.rank not in self.failed and (end.error is not None or end.died):
            self.failed.append(end.rank)

    def load_outcomes(self) -> list[Outcome | None]:
        """What the ranks have written of their ends; None where they did not come so far."""
        return [rank.load_outcome() if rank.end.returned or rank.end.error else None for rank in self.ranks]

    def close(self) -> None:
        """Write what is left of the output, and give everything back."""
        self._selector.close()
        for rank in self.ranks:
            rank.close()
