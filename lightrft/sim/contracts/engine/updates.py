"""EN501 and on: what `update_weights` leaves behind, whether it succeeds or fails."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightrft.errors import EngineStateError, StaleWeightsError, WeightSyncError
from lightrft.sim.contracts.engine.capabilities import contract
from lightrft.sim.contracts.engine.subject import Subject, buckets_of, counted
from lightrft.sim.contracts.findings import expect, refused
from lightrft.strategy.engine import EngineStatus

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from lightrft.strategy.requests import Completion

__all__: list[str] = []


@contract.check(501)
def check_updates_in_turn(subject: Subject) -> None:
    """Updates to one model and the other in turn each end as an engine that was started with it, and count the version up (F20)."""  # noqa: E501
    engine = subject.fresh()
    version = engine.weight_version
    told: dict[int, list[Completion]] = {}
    for count, index in enumerate((1, 0, 1, 0), 1):
        subject.send(index)
        expect(engine.weight_version == version + count, f"update {count} gave version {engine.weight_version}")
        expect(engine.status is EngineStatus.AWAKE, f"after update {count} it is {engine.status}")
        subject.holds(index, f"after update {count}")
        found = [dataclasses.replace(one, weight_version=0) for one in subject.generate(logprobs=0)]
        before = told.setdefault(index, found)
        expect(subject.alike(before, found), f"update {count} gave other log-probs than the one before it")


@contract.check(502)
def check_versions_only_grow(subject: Subject) -> None:
    """An update whose version is not larger is refused before anything is read, and a version may leave some out."""
    engine = subject.fresh()
    for version in (engine.weight_version, engine.weight_version - 1):
        read: list[str] = []
        update = functools.partial(engine.update_weights, counted(subject.weights(1), read), version)
        message = refused(update, EngineStateError)
        expect(str(version) in message, f"the message does not say which: {message}")
        expect(not read, f"{len(read)} weights were read")
    expect(engine.status is EngineStatus.AWAKE, f"afterwards it is {engine.status}")
    subject.holds(0, "after versions that were refused")
    engine.update_weights(buckets_of(subject.weights(1)), engine.weight_version + 5)
    engine.reset_caches()
    subject.holds(1, "after a version that is five larger")


@contract.check(503)
def check_no_cache_outlives_its_weights(subject: Subject) -> None:
    """After an update and `reset_caches`, prompts that were completed before are completed by the new weights (F05)."""
    subject.fresh()
    for index in (0, 1, 0):
        subject.send(index)
        for time in ("first", "second"):  # out of the cache
            subject.holds(index, f"at its {time} completion of the prompts")


def _stale_then_whole(subject: Subject, version: int, when: str) -> None:
    """The engine is stale, says so, and good again after a whole update."""
    engine = subject.engine
    found = engine.status, engine.weight_version
    expect(found == (EngineStatus.STALE, version), f"{when} it is {found[0]} at version {found[1]}, before {version}")
    refused(subject.generate, StaleWeightsError)
    subject.send(1)
    subject.holds(1, f"after {when} and a whole update")


def _wrong(subject: Subject) -> Iterator[tuple[str, Mapping[str, Tensor | None], tuple[str, ...]]]:
    weights = subject.weights(1)
    name, weight = next((name, weight) for name, weight in weights.items() if weight.dim() == 2)
    last, vector = [(name, weight) for name, weight in weights.items() if weight.dim() == 1][-1]
    yield "a weight missing", {**weights, name: None}, (name, "missing")
    yield "the last one missing", {**weights, last: None}, (last, "missing")
    yield "nothing", {}, ("missing",)
    yield "a foreign weight", {**weights, "extra.weight": torch.zeros(3)}, ("extra.weight",)
    yield "a name with a prefix", {**weights, name: None, f"module.{name}": weight}, (f"module.{name}",)
    yield "another shape", {**weights, name: weight[:-1]}, (name, str(tuple(weight[:-1].shape)))
    yield "as many numbers in another shape", {**weights, name: weight.reshape(-1)}, (name,)
    yield "whole numbers", {**weights, last: vector.to(torch.int32)}, (last, "int32")


@contract.check(504)
def check_weights_that_do_not_fit_are_named(subject: Subject) -> None:
    """Weights that are missing, unknown, of another shape or no floating-point numbers are a WeightSyncError that names them; the engine is stale at its former version, and the next whole update makes it good (F06)."""  # noqa: E501
    engine = subject.fresh()
    for what, weights, said in _wrong(subject):
        version = engine.weight_version
        message = refused(lambda weights=weights: subject.send(weights), WeightSyncError)  # type: ignore[misc]
        expect(all(part in message for part in said), f"{what} was refused without a word of {said}: {message}")
        _stale_then_whole(subject, version, what)


@contract.check(505)
def check_a_weight_that_comes_twice_is_named(subject: Subject) -> None:
    """A weight that comes twice in one update is a WeightSyncError that names it (F06)."""
    engine = subject.fresh()
    version = engine.weight_version
    weights = subject.weights(1)
    name = next(iter(weights))
    twice = itertools.chain(buckets_of(weights), [[(name, weights[name])]])
    message = refused(lambda: engine.update_weights(twice, version + 1), WeightSyncError)
    expect(name in message and "twice" in message, f"{name} came twice, and the error is {message!r}")
    _stale_then_whole(subject, version, "a weight that came twice")


def _failing(weights: Mapping[str, Tensor], last: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Some buckets, and then an error."""
    yield from itertools.islice(buckets_of(weights), last)
    raise OSError("the disk is gone")


@contract.check(506)
def check_a_failing_source_is_survived(subject: Subject) -> None:
    """If what gives the buckets fails, at the first, in the middle or after the last, that error is told and the engine is stale until a whole update; nothing of the broken one is in it (F17, F20)."""  # noqa: E501
    engine = subject.fresh()
    several = len(list(buckets_of(subject.weights(1))))
    for last in (0, 1, several // 2, several):
        version = engine.weight_version

        update = functools.partial(engine.update_weights, _failing(subject.weights(0), last), version + 1)
        message = refused(update, WeightSyncError)
        expect("the disk is gone" in message, f"the error of the source is not told: {message}")
        _stale_then_whole(subject, version, f"a source that failed after {last} buckets")


@contract.check(507)
def check_buckets_are_read_before_the_end(subject: Subject) -> None:
    """Buckets may be of any size and their weights in any order; when the update has ended, all of them were read (F07, F08)."""  # noqa: E501
    subject.fresh()
    for size, index in ((1, 1), (5_000, 0), (1 << 30, 1)):
        backwards = dict(reversed(subject.weights(index).items()))
        for weights in (subject.weights(index), backwards):
            subject.send(weights, bucket_bytes=size)
            subject.holds(index, f"sent in buckets of {size} bytes")


@contract.check(508)
def check_buckets_are_gathered_as_outside(subject: Subject) -> None:
    """While the engine asks for buckets, gradients, inference mode and the default dtype are as the caller has them."""
    engine = subject.fresh()
    modes = set()

    def watched() -> Iterator[list[tuple[str, Tensor]]]:
        for bucket in buckets_of(subject.weights(1)):
            modes.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()))
            yield bucket

    engine.update_weights(watched(), engine.weight_version + 1)
    expected = {(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())}
    expect(modes == expected, f"buckets were gathered with {modes}, expected {expected}")


@contract.check(509)
def check_nothing_else_is_done_during_an_update(subject: Subject) -> None:
    """While it is updated an engine says so, and refuses every other move, from the source of its weights for example."""  # noqa: E501
    engine = subject.fresh()
    statuses: set[EngineStatus] = set()
    messages: list[str] = []

    def meddling() -> Iterator[list[tuple[str, Tensor]]]:
        for place, bucket in enumerate(buckets_of(subject.weights(1))):
            statuses.add(engine.status)
            if not place:
                moves = (subject.generate, engine.sleep, engine.wake_up, engine.reset_caches)
                messages.extend(refused(move, EngineStateError) for move in moves)
            yield bucket

    engine.update_weights(meddling(), engine.weight_version + 1)
    expect(statuses == {EngineStatus.UPDATING}, f"meanwhile it is {statuses}")
    expect(all("being updated" in message for message in messages), f"the moves were refused by {messages}")
    engine.reset_caches()
    subject.holds(1, "after moves that were refused during the update")
