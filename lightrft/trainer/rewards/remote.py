"""Rewards by a service over HTTP.

The service gets ``POST`` with JSON: ``{"prompts": [...], "responses": [...], "labels": [...]}``, lists of equal length,
and answers with JSON: ``{"rewards": [...]}``, a number for each, and perhaps further lists, which are reported; or with
the list alone.
"""

from __future__ import annotations

import http.client
import io
import json
import random
import socket
import ssl
import time
from typing import Any
from urllib.parse import urlsplit

from lightrft.errors import ConfigError, RewardError
from lightrft.trainer.rewards.source import Rewards, RewardSource, Scored, scores_of

__all__ = ["RemoteReward"]

_SHOWN = 300
"""Characters of an answer in a message."""
_LARGEST = 64 << 20
"""Bytes of an answer that are read."""
_FINAL = range(400, 500)
"""Statuses that another attempt does not change, but for those below."""
_PASSING = (408, 409, 425, 429)


class _AttemptError(Exception):
    """One attempt that gave no rewards.

    Args:
        what: happened, for people.
        final: whether another attempt would end the same.
        wait: seconds that the service wants to be left alone.
    """

    def __init__(self, what: str, final: bool = False, wait: float = 0.0) -> None:
        super().__init__(what)
        self.what = what
        self.final = final
        self.wait = wait


class RemoteReward(RewardSource):
    """Asks a service. An attempt that fails is repeated after a while, twice as long each time.

    Args:
        url: ``http://host:port/path`` or ``https://...``.
        timeout: seconds that one attempt may take as a whole, from connecting to the last byte.
        attempts: how often it is tried.
        backoff: seconds before the second attempt; each may be up to half as long again, at random.
        most_backoff: longest seconds between two attempts.
        batch_size: samples of one request.
        headers: of the request, such as ``{"Authorization": "Bearer ..."}``.
        name: by which it is reported.

    Raises:
        ConfigError: an argument cannot work.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 60.0,
        attempts: int = 5,
        backoff: float = 0.5,
        most_backoff: float = 30.0,
        batch_size: int = 256,
        headers: dict[str, str] | None = None,
        name: str = "remote",
    ) -> None:
        self.name = name
        self.url = url
        self._where = urlsplit(url)
        if self._where.scheme not in ("http", "https") or not self._where.hostname:
            raise ConfigError(f"{url!r} is no address of a reward service: expected http://host:port/path")
        if not (timeout > 0 and attempts >= 1 and backoff >= 0 and batch_size >= 1):
            raise ConfigError(
                f"timeout={timeout}, attempts={attempts}, backoff={backoff}, batch_size={batch_size}: expected a "
                "timeout above 0, at least 1 attempt, a backoff of 0 or more, and at least 1 sample in a request"
            )
        self._timeout = timeout
        self._attempts = attempts
        self._backoff = backoff
        self._most_backoff = most_backoff
        self._batch_size = batch_size
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"} | (headers or {})
        self._chance = random.Random(url)  # of its own: waiting changes no random state of the run

    def __call__(self, samples: Scored) -> Rewards:
        """See ``RewardSource``. It takes at most ``attempts * timeout`` seconds a request, and the time in between."""
        columns: dict[str, Any] = {"prompts": "prompt", "responses": "response", "labels": "label"}
        answers: list[dict[str, Any]] = []
        for first in range(0, len(samples), self._batch_size):
            part = samples[first : first + self._batch_size]
            question = {column: [getattr(one, name) for one in part] for column, name in columns.items()}
            try:
                body = json.dumps(question).encode()
            except TypeError as error:
                raise RewardError(f"samples cannot be sent to {self.url} as JSON: {error}") from error
            answers.append(self._ask(body, len(part)))
        names = dict.fromkeys(name for each in answers for name in each)
        joined = {name: [value for each in answers for value in each.get(name, [])] for name in names}
        return scores_of(joined or [], len(samples), f"the reward service {self.url}")

    def _ask(self, body: bytes, count: int) -> dict[str, Any]:
        """The answer to one request, which has a number for each of ``count`` samples."""
        failure = _AttemptError("nothing was tried")
        tried = 0
        for tried in range(1, self._attempts + 1):
            try:
                return self._attempt(body, count)
            except _AttemptError as found:
                failure = found
            if failure.final or tried == self._attempts:
                break
            pause = min(self._backoff * 2 ** (tried - 1) * (1 + self._chance.random() / 2), self._most_backoff)
            time.sleep(max(pause, min(failure.wait, self._most_backoff)))
        raise RewardError(
            f"the reward service {self.url} gave no rewards for {count} samples in {tried} of {self._attempts} "
            f"attempts of up to {self._timeout:g} s: the last time {failure.what}"
        )

    def _attempt(self, body: bytes, count: int) -> dict[str, Any]:
        try:
            status, wait, answer = self._post(body)
        except TimeoutError:
            raise _AttemptError("it did not answer in time") from None
        except (OSError, http.client.HTTPException) as error:
            raise _AttemptError(f"the connection failed ({type(error).__name__}: {error})") from error
        shown = answer[:_SHOWN].decode(errors="replace")
        if status != 200:
            final = status in _FINAL and status not in _PASSING
            raise _AttemptError(f"it answered with status {status}: {shown!r}", final, wait)
        try:
            found = json.loads(answer)
            found = found if isinstance(found, dict) else {"rewards": found}
            scores_of(found, count, "it")
        except (ValueError, RewardError, RecursionError) as error:
            raise _AttemptError(f"it answered {shown!r}, which are no rewards ({error})") from error
        return found

    def _post(self, body: bytes) -> tuple[int, float, bytes]:
        """Status, seconds to wait, and contents of an answer."""
        deadline = time.monotonic() + self._timeout
        secure = self._where.scheme == "https"
        port = self._where.port or (443 if secure else 80)
        plain = socket.create_connection((self._where.hostname, port), timeout=self._timeout)
        with plain:
            wire = plain
            if secure:
                wire = ssl.create_default_context().wrap_socket(plain, server_hostname=self._where.hostname)
            target = (self._where.path or "/") + (f"?{self._where.query}" if self._where.query else "")
            lines = [f"POST {target} HTTP/1.1", f"Host: {self._where.netloc.rpartition('@')[2]}", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in self._headers.items()]
            lines += [f"Content-Length: {len(body)}", "", ""]
            wire.settimeout(_left(deadline))
            wire.sendall("\r\n".join(lines).encode() + body)
            response = http.client.HTTPResponse(_Patient(wire, deadline), method="POST")  # type: ignore[arg-type]
            with response:
                response.begin()
                answer = response.read(_LARGEST + 1)
                if len(answer) > _LARGEST:
                    raise _AttemptError(f"its answer was larger than {_LARGEST >> 20} MiB", final=True)
                return response.status, _seconds(response.getheader("Retry-After")), answer


class _Patient(io.RawIOBase):
    """The reading end of a socket that has to be done by ``deadline``, however slowly bytes come."""

    def __init__(self, wire: socket.socket, deadline: float) -> None:
        self._wire = wire
        self._deadline = deadline

    def makefile(self, mode: str) -> io.BufferedReader:  # noqa: ARG002 - as a socket's
        """What ``http.client`` reads from."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """As a socket's, which waits no longer than until the deadline."""
        self._wire.settimeout(_left(self._deadline))
        return self._wire.recv_into(buffer)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _seconds(header: str | None) -> float:
    return float(header) if header is not None and header.strip().isdecimal() else 0.0
