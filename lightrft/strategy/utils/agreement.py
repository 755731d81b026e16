"""Ranks that succeed or fail together: what goes wrong on one is an error on all, and nobody is left waiting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from lightrft import errors

__all__ = ["Outcome", "Ranks", "check_same"]

_MOST_NAMED = 4


@dataclass(slots=True)
class Outcome:
    """What the ranks bring into a step that they do together, and take out of it."""

    mine: Any = None
    """What this rank brings; it has to be small, and pickled easily."""
    all: list[Any] = field(default_factory=list)
    """What each rank has brought, by rank; filled when the step has ended."""


class Ranks:
    """The ranks of a process group, or one rank alone without any.

    Args:
        group: whose ranks; ``None`` is the default group, if there is one.
        rank, world_size: place in the group and its size; read from the group where they are not given. A world of one
            rank needs no process group.

    Raises:
        ConfigError: there is no process group, and the world has several ranks; or the rank is not in the world.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, rank: int | None = None, world_size: int | None = None
    ) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        if world_size is None:
            world_size = dist.get_world_size(group) if grouped else 1
        if rank is None:
            rank = dist.get_rank(group) if grouped and world_size > 1 else 0
        if not 0 <= rank < world_size:
            raise errors.ConfigError(f"rank={rank}: expected a rank of a world of {world_size}, 0 to {world_size - 1}")
        if world_size > 1 and not grouped:
            raise errors.ConfigError(
                f"world_size={world_size}, but there is no process group: call setup_distributed() first"
            )
        self.group = group
        self.rank = rank
        self.world_size = world_size

    def gather(self, value: Any) -> list[Any]:
        """What each rank has passed, by rank. One ``all_gather_object``; none for a rank alone."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def together(self, what: str, otherwise: type[errors.LightRFTError] = errors.CheckpointError) -> Iterator[Outcome]:
        """A step that fails on every rank if it fails on one. It costs one :meth:`gather`, whether it fails or not.

        A step that is left by something other than an ``Exception`` (an interrupt, the end of the process), or by a
        ``LostRanksError``, is left without it.

        Args:
            what: what did not happen if the step fails, as the beginning of the message.
            otherwise: class of the error if the step raised none of this package.

        Raises:
            LightRFTError: the step raised one on some rank; the class is that of the lowest such rank.
        """
        outcome = Outcome()
        try:
            yield outcome
        except errors.LostRanksError:
            raise  # the others do not answer
        except Exception as error:  # noqa: BLE001 - it is raised on every rank
            self._settle(what, outcome, error, otherwise)
        else:
            self._settle(what, outcome, None, otherwise)

    def _settle(
        self, what: str, outcome: Outcome, error: Exception | None, otherwise: type[errors.LightRFTError]
    ) -> None:
        mine = None if error is None else (type(error).__name__, _text(error))
        gathered = self.gather((mine, outcome.mine))
        failures = {rank: failure for rank, (failure, _) in enumerate(gathered) if failure is not None}
        if failures:
            raise _error(what, failures, self.world_size, otherwise) from error
        outcome.all = [value for _, value in gathered]


def check_same(settings: Sequence[Mapping[str, Any]], what: str) -> None:
    """Every rank has passed the same settings, which the ranks have gathered.

    Args:
        settings: those of each rank, by rank; all have the same keys.
        what: what did not happen if they differ, as the beginning of the message.

    Raises:
        ConfigError: some differ, on every rank; the message names the setting and who has which value.
    """
    for name, value in settings[0].items():
        for rank, other in enumerate(settings):
            if other[name] != value:
                raise errors.ConfigError(
                    f"{what}: {name} is {value!r} on rank 0 and {other[name]!r} on rank {rank}; "
                    "expected the same on all ranks"
                )


def _text(error: Exception) -> str:
    own = isinstance(error, errors.LightRFTError)
    return str(error) if own else f"{type(error).__name__}: {error}"


def _error(
    what: str, failures: dict[int, tuple[str, str]], world_size: int, otherwise: type[errors.LightRFTError]
) -> errors.LightRFTError:
    """The error that all ranks raise: the same on each."""
    name = next(iter(failures.values()))[0]
    found = getattr(errors, name, None)
    cls = found if isinstance(found, type) and issubclass(found, errors.LightRFTError) else otherwise
    texts = [text for _, text in failures.values()]
    if len(set(texts)) == 1 and len(failures) == world_size:
        return cls(f"{what}: {texts[0]}")
    named = [f"rank {rank}: {text}" for rank, (_, text) in list(failures.items())[:_MOST_NAMED]]
    more = len(failures) - len(named)
    return cls(f"{what}: " + "; ".join(named) + (f"; and {more} more ranks" if more else ""))
