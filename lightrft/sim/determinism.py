"""``SimWorld(check_determinism=True)``: run everything twice, and stop where the second run differs from the first.

The first run is taken down: for each call of each rank the call itself, what the rank contributes to it and the state
of the rank's generators. The second run is compared call by call, while it runs.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from lightrft.errors import NondeterminismError, SimulationError
from lightrft.sim.calls import Call
from lightrft.sim.divergence import Culprit, _replay
from lightrft.sim.observations import (
    Budget,
    Contents,
    Finding,
    RandomState,
    contributed,
    differing_results,
    random_states,
)
from lightrft.sim.places import UNKNOWN, Place, is_user_file
from lightrft.sim.scheduler import Killed

if TYPE_CHECKING:
    from lightrft.sim.rank import SimRank
    from lightrft.sim.world import SimWorld

__all__ = ["Difference", "Observer", "run_twice"]


class Observer(Protocol):
    """What a world tells about a run, on the thread and in the process state of the rank."""

    def called(self, rank: SimRank, call: Call, inputs: Sequence[Any]) -> None:
        """A rank makes a call, to which it contributes ``inputs``."""

    def returned(self, rank: SimRank) -> None:
        """The function of the run has returned on a rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Where the second of two runs differs from the first; the ``report`` of the error.

    Attributes:
        rank: the rank that differs.
        event: index into ``world.trace`` of its call; the length of the trace if it was about to end.
        operation: the call, as the second run made it, or what the rank did instead.
        place: the line.
        findings: in what they differ, most telling first.
        agreed: the last call of this rank that was the same in both runs; empty if there is none.
        seed: seed of the runs.
        replay: how to run them again.
    """

    rank: int
    event: int
    operation: str
    place: Place
    findings: tuple[Finding, ...]
    agreed: str
    seed: int
    replay: str

    @property
    def culprits(self) -> tuple[Culprit, ...]:
        """The rank and its line, as other reports give them."""
        return (Culprit(self.rank, self.place),)

    def __str__(self) -> str:
        where = f"at {self.place} in {self.place.function}" if self.place is not UNKNOWN else "(no line of yours)"
        lines = [f"  rank {self.rank}  {self.operation} (world.trace[{self.event}])", f"    {where}"]
        if self.place.source:
            lines.append(f"    > {self.place.source}")
        for finding in self.findings:
            lines += ["", f"  {finding.what}:", f"    first run   {finding.first}", f"    second run  {finding.second}"]
        agreed = f"did the same in both runs up to {self.agreed}" if self.agreed else "has made no call before"
        lines += ["", f"  rank {self.rank} {agreed}"]
        return "\n".join([*lines, "", f"seed {self.seed}; run it again with: {self.replay}"])


def run_twice(world: SimWorld, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Run ``fn`` on every rank, twice; the second run gets copies of the data in the arguments, made before the first.

    Returns:
        the results of the first run, by rank.

    Raises:
        NondeterminismError: the second run differs.
        SimulationError: the first run failed; there is no second.
    """
    again, again_args, again_kwargs = _copies(world, fn, args, kwargs)
    modules = set(sys.modules)
    first = _Recording()
    try:
        world._observer = first
        results = world._run_once(fn, args, kwargs)
        world._let_go()
        _forget_modules(modules)
        second = _Comparison(world, first, _place_of(fn))
        world._observer = second
        with _silent(world):  # the first run has said it
            repeated = world._run_once(again, again_args, again_kwargs)
        second.check_end()
    except NondeterminismError:
        raise
    except SimulationError as error:
        if world._observer is first:
            raise
        raise second.failed(error) from error
    finally:
        world._observer = None
    second.check_results(results, repeated)
    return results


# -- the first run ----------------------------------------------------------------------------------------------------


@contextmanager
def _silent(world: SimWorld) -> Iterator[None]:
    warn, world.warn = world.warn, lambda _: None
    try:
        yield
    finally:
        world.warn = warn


class _Observation(NamedTuple):
    """A call of one rank."""

    what: str
    place: Place
    since: int
    random: tuple[RandomState, ...]
    inputs: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.what} at {self.place}" if self.place is not UNKNOWN else self.what


class _Recording:
    """Takes down a run."""

    def __init__(self) -> None:
        self.order: list[int] = []
        """The rank of each call, in the order of the trace."""
        self.calls: dict[int, list[_Observation]] = {}
        self.ends: dict[int, tuple[RandomState, ...]] = {}
        self.budget = Budget()

    def called(self, rank: SimRank, call: Call, inputs: Sequence[Any]) -> None:
        self.order.append(rank.index)
        self.calls.setdefault(rank.index, []).append(_observe(rank, call, inputs, self.budget))

    def returned(self, rank: SimRank) -> None:
        self.ends[rank.index] = random_states(rank)


def _observe(rank: SimRank, call: Call, inputs: Sequence[Any], budget: Budget) -> _Observation:
    random = random_states(rank)
    return _Observation(call.describe(), call.place, call.since, random, contributed(call, inputs, budget))


# -- the second run ---------------------------------------------------------------------------------------------------


class _Comparison:
    """Compares a run with one that was taken down, and ends it where they differ.

    Ranks are compared one by one, each with its own sequence of calls, so that the rank that differs is named and not
    one that merely came earlier for it. Only then does the order of the ranks count.
    """

    def __init__(self, world: SimWorld, first: _Recording, function: Place) -> None:
        self._world = world
        self._first = first
        self._function = function
        self._counts = [0] * world.size

    def called(self, rank: SimRank, call: Call, inputs: Sequence[Any]) -> None:
        if self._world.scheduler.drain_until is not None:
            return  # the run has failed already, and will say why
        event = len(self._world._calls) - 1
        expected = self._expected(rank.index)
        seen = _observe(rank, call, inputs, Budget())
        if expected is None:
            finding = Finding(what="event", first="the rank made no more calls", second=str(seen))
            self._stop(rank.index, event, seen.what, seen.place, [finding])
        findings = _differences(expected, seen)
        if findings:
            self._stop(rank.index, event, seen.what, seen.place, findings)
        self._check_order(rank.index, event, seen, expected)
        self._counts[rank.index] += 1

    def returned(self, rank: SimRank) -> None:
        if self._world.scheduler.drain_until is not None:
            return
        event = len(self._world._calls)
        expected = self._expected(rank.index)
        if expected is not None:
            self._stop(rank.index, event, *_ended(expected))
        findings = _random_differences(self._first.ends.get(rank.index, ()), random_states(rank))
        if findings:
            self._stop(rank.index, event, "the end of its function", self._latest_place(rank.index), findings)

    def check_end(self) -> None:
        """A rank that ended its process with ``os._exit`` has not told that it returned."""
        for rank in range(self._world.size):
            expected = self._expected(rank)
            if expected is not None:
                raise self._error(rank, len(self._world._calls), *_ended(expected))

    def check_results(self, first: list[Any], second: list[Any]) -> None:
        """What the ranks returned is equal, as far as that can be told."""
        for rank, (before, after) in enumerate(zip(first, second, strict=True)):
            finding = differing_results(before, after)
            if finding is not None:
                raise self._error(rank, len(self._world._calls), "returned", self._function, [finding])

    def failed(self, error: SimulationError) -> NondeterminismError:
        """The first run ended well and the second did not."""
        culprits = getattr(error.report, "culprits", ())
        rank, place = (culprits[0].rank, culprits[0].place) if culprits else (0, self._function)
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        finding = Finding(what="outcome", first="the run ended well", second=said)
        return self._error(rank, len(self._world._calls), "the second run failed", place, [finding])

    # -- inside -------------------------------------------------------------------------------------------------

    def _expected(self, rank: int) -> _Observation | None:
        """What ``rank`` did next in the first run."""
        calls = self._first.calls.get(rank, [])
        count = self._counts[rank]
        return calls[count] if count < len(calls) else None

    def _check_order(self, rank: int, event: int, seen: _Observation, expected: _Observation) -> None:
        turn = self._first.order[event]
        if turn == rank:
            return
        awaited = self._expected(turn)
        assert awaited is not None  # the order has been the same up to here
        task = self._world.ranks[turn].main
        waiting = task.waiting if task is not None else None
        meanwhile = f", while rank {turn} waits in {waiting.describe()} at {waiting.place}" if waiting else ""
        finding = Finding(
            what="order of the ranks",
            first=f"next came rank {turn}: {awaited}",
            second=f"next came rank {rank}: {seen}{meanwhile}",
        )
        if seen.since == expected.since and waiting is not None and not isinstance(waiting, Call):
            # This rank is on time: the other is late.
            self._stop(turn, event, waiting.describe(), waiting.place, [finding])
        self._stop(rank, event, seen.what, seen.place, [finding])

    def _latest_place(self, rank: int) -> Place:
        count = self._counts[rank]
        return self._first.calls[rank][count - 1].place if count else self._function

    def _stop(self, rank: int, event: int, operation: str, place: Place, findings: Sequence[Finding]) -> NoReturn:
        world = self._world
        world._verdict = self._error(rank, event, operation, place, findings)
        world.scheduler.kill_all()
        raise Killed

    def _error(
        self, rank: int, event: int, operation: str, place: Place, findings: Sequence[Finding]
    ) -> NondeterminismError:
        world, count = self._world, self._counts[rank]
        agreed = str(self._first.calls[rank][count - 1]) if count else ""
        difference = Difference(
            rank=rank,
            event=event,
            operation=operation,
            place=place,
            findings=tuple(findings),
            agreed=agreed,
            seed=world.seed,
            replay=_replay(world),
        )
        names = ", ".join(finding.what for finding in findings)
        head = f"not deterministic: two runs of one seed differ ({names}). Look at rank {rank} at {place}."
        return NondeterminismError(f"{head}\n\n{difference}", report=difference)


def _ended(expected: _Observation) -> tuple[str, Place, list[Finding]]:
    finding = Finding(what="event", first=str(expected), second="the rank made no more calls")
    return "ended", expected.place, [finding]


def _differences(first: _Observation, second: _Observation) -> list[Finding]:
    random = _random_differences(first.random, second.random)
    if (first.what, first.place) != (second.what, second.place):
        return [Finding(what="event", first=str(first), second=str(second)), *random]
    return [*random, *_input_differences(first.inputs, second.inputs)]


def _random_differences(first: Sequence[RandomState], second: Sequence[RandomState]) -> list[Finding]:
    return [
        Finding(what=f"random draws of {a.name}", first=str(a), second=str(b))
        for a, b in zip(first, second, strict=False)
        if a.digest != b.digest
    ]


def _input_differences(first: Sequence[Any], second: Sequence[Any]) -> list[Finding]:
    if len(first) != len(second):
        return [Finding(what="number of inputs", first=str(len(first)), second=str(len(second)))]
    found: list[Finding] = []
    for position, (a, b) in enumerate(zip(first, second, strict=True)):
        if isinstance(a, Contents) and isinstance(b, Contents):
            finding = a.compare(b, f"contents of tensor {position}")
            found += [finding] if finding is not None else []
        elif a != b:
            found.append(Finding(what=f"argument {position}", first=str(a), second=str(b)))
    return found


# -- a fresh start for the second run ---------------------------------------------------------------------------------


_DATA = (list, tuple, dict, set, deque, bytearray, Tensor, np.ndarray, torch.nn.Module, torch.optim.Optimizer, Random)


def _copies(world: SimWorld, fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Copies for the second run of what the first may change: containers, tensors, modules, dataclasses, generators.

    Other objects, which may stand for something outside the program, and what cannot be copied are passed as they are.
    """
    memo: dict[int, Any] = {id(world): world}

    def copied(value: Any) -> Any:
        if not isinstance(value, _DATA) and (isinstance(value, type) or not is_dataclass(value)):
            return value
        try:
            return copy.deepcopy(value, memo)
        except Exception:  # noqa: BLE001 - whatever the class of an argument raises: it does not want to be copied
            return value

    if isinstance(fn, functools.partial):
        fn = functools.partial(fn.func, *map(copied, fn.args), **{key: copied(v) for key, v in fn.keywords.items()})
    return fn, tuple(map(copied, args)), {key: copied(value) for key, value in kwargs.items()}


def _forget_modules(before: set[str]) -> None:
    """Have the second run import again, and so run again, the user's modules that the first run was first to import."""
    for name in sys.modules.keys() - before:
        module = sys.modules[name]
        if name == "__main__" or not is_user_file(getattr(module, "__file__", None)):
            continue
        del sys.modules[name]
        parent, _, child = name.rpartition(".")
        if parent in sys.modules and vars(sys.modules[parent]).get(child) is module:
            delattr(sys.modules[parent], child)


def _place_of(fn: Any) -> Place:
    """The line at which a function is defined."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    code = getattr(getattr(fn, "__wrapped__", fn), "__code__", None)
    return Place(code.co_filename, code.co_firstlineno, code.co_name) if code is not None else UNKNOWN
