"""EN601 and on: an engine that two ranks share. Both live through the same calls once; each check looks at a part."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightrft.errors import LightRFTError
from lightrft.sim.contracts.engine.capabilities import contract
from lightrft.sim.contracts.engine.subject import GREEDY, Subject, buckets_of
from lightrft.sim.contracts.findings import expect
from lightrft.strategy import weight_sync
from lightrft.strategy.requests import requests_of
from lightrft.strategy.rollout import gather_and_generate

if TYPE_CHECKING:
    from lightrft.strategy.engine import RolloutEngine

__all__ = ["life"]

Prompts = Sequence[tuple[int, ...]]


class _Rank:
    """One of the ranks that share an engine.

    Args:
        engine: shared.
        group: its ranks.
        prompts: of both ranks: the first one has three of the four.
        weights: of two models.
    """

    def __init__(self, engine: RolloutEngine, group: Any, prompts: Prompts, weights: list[dict[str, Tensor]]) -> None:
        self.engine = engine
        self.rank = dist.get_rank()
        self._group = group
        self._weights = weights
        self.mine = [prompts[:3], prompts[3:]][self.rank]

    def generate(self, prompts: Prompts, **params: Any) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
        """Prompt, tokens and version of each completion of this rank."""
        found = gather_and_generate(
            self.engine,
            lambda: requests_of(prompts),
            {**GREEDY, **params},
            group=self._group,
            device=torch.device("cpu"),
        )
        return [(one.prompt_token_ids, one.output_token_ids, one.weight_version) for one in found]

    def send(self, index: int, without: str = "") -> None:
        """Send the weights of a model, but for one, and have them verified where the engine can tell."""
        weights = {name: tensor for name, tensor in self._weights[index].items() if name != without}
        verify = self.engine.tells_weights
        weight_sync.send(self.engine, weights.items(), bucket_bytes=1 << 14, poison=True, verify=verify)

    def failing(self) -> Iterator[list[tuple[str, Tensor]]]:
        """Weights whose source fails on the second rank."""
        for place, bucket in enumerate(buckets_of(self._weights[1])):
            if place == 2 and self.rank:
                raise OSError("the disk is gone")
            yield bucket

    def name(self) -> str:
        """Of some weight."""
        return list(self._weights[0])[1]


def _said(call: Callable[[], object]) -> str:
    try:
        call()
    except LightRFTError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def life(
    start: Callable[[Any], RolloutEngine], prompts: Prompts, weights: list[dict[str, Tensor]], vocabulary: int
) -> dict[str, Any]:
    """What a rank finds, by name; the same calls on both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries
        if not dist.is_initialized():
            dist.init_process_group("gloo")
        group = dist.new_group([0, 1])
        rank = _Rank(start(group), group, prompts, weights)
        found = _lived(rank, prompts, vocabulary)
        rank.engine.shutdown()
        rank.engine.shutdown()
        found["status, ended"] = str(rank.engine.status)
        ones = torch.ones(1)
        dist.all_reduce(ones)  # the group of the trainer outlives the engine
        found["after the end"] = ones.item()
        dist.destroy_process_group()
    return found


def _lived(rank: _Rank, prompts: Prompts, vocabulary: int) -> dict[str, Any]:
    engine = rank.engine
    found: dict[str, Any] = {
        "name": rank.name(),
        "own": rank.generate(rank.mine),
        "none on one": rank.generate(list(prompts) if rank.rank else []),
        "one more": rank.generate([*rank.mine, *prompts[: rank.rank]], n=2, temperature=1.0),
        "bad": _said(lambda: rank.generate([(vocabulary,)] if rank.rank else rank.mine)),
        "after bad": rank.generate(rank.mine),
    }
    if engine.runs_on_all_ranks:
        different = {"temperature": 0, "max_tokens": 4 + rank.rank}
        found["different"] = _said(lambda: engine.generate(requests_of(prompts), different))
        found["different prompts"] = _said(lambda: engine.generate(requests_of([prompts[rank.rank]]), GREEDY))
    elif rank.rank:
        found["different"] = found["different prompts"] = _said(lambda: engine.generate(requests_of(prompts), GREEDY))
    rank.send(1)
    found["updated"] = rank.generate(rank.mine)
    engine.sleep(2)
    found["status, asleep"] = str(engine.status)
    found["in its sleep"] = _said(lambda: rank.generate(rank.mine))
    engine.wake_up(["weights"])
    rank.send(0)
    engine.wake_up()
    found["updated again"] = rank.generate(rank.mine)
    found["missing"] = _said(lambda: rank.send(1, without=rank.name() if rank.rank else ""))
    found["status, missing"] = str(engine.status)
    found["stale"] = _said(lambda: rank.generate(rank.mine))
    found["source"] = _said(lambda: engine.update_weights(rank.failing(), engine.weight_version + 1))
    found["status, source"] = str(engine.status)
    rank.send(1)
    found["good again"] = rank.generate(rank.mine)
    found["version"] = engine.weight_version
    return found


def _both(subject: Subject, name: str) -> list[Any]:
    """What both ranks have found."""
    return [found.get(name) for found in subject.shared_lives]


def _alone(subject: Subject, index: int, prompts: Prompts) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompts and completions of an engine of one rank."""
    subject.fresh()
    if index:
        subject.send(index)
    return [(one.prompt_token_ids, one.output_token_ids) for one in subject.generate(prompts)]


def _are_those_of(found: list[Any], index: int, subject: Subject, what: str) -> None:
    """Completions of both ranks, in their order, are those of an engine of one rank."""
    both = [(prompt, tokens) for each in found for prompt, tokens, _ in each]
    alone = _alone(subject, index, [prompt for prompt, _ in both])
    expect(both == alone, f"{what}: two ranks got {both}, and an engine of one rank gives {alone}")


@contract.check(601, "shared", probed=False)
def check_ranks_get_their_own_completions(subject: Subject) -> None:
    """Ranks that share an engine each get the completions of their own prompts, as one rank alone would, with one prompt, several and none (F12, K05)."""  # noqa: E501
    own, none, more = (_both(subject, name) for name in ("own", "none on one", "one more"))
    _are_those_of(own, 0, subject, "prompts of both")
    prompts = [[prompt for prompt, *_ in each] for each in own]
    expect(prompts == [subject.prompts[:3], subject.prompts[3:]], f"ranks got the completions of {prompts}")
    expect(none[0] == [], f"the rank without prompts got {none[0]}")
    _are_those_of(none, 0, subject, "prompts of one")
    drawn = [[prompt for prompt, *_ in each] for each in more]
    wanted = [
        [p for p in (*subject.prompts[:3],) for _ in "ab"],
        [p for p in (subject.prompts[3], subject.prompts[0]) for _ in "ab"],
    ]
    expect(drawn == wanted, f"with n=2 ranks got the completions of {drawn}, expected {wanted}")


@contract.check(602, "shared", probed=False)
def check_ranks_that_ask_for_different_things_are_told(subject: Subject) -> None:
    """Different prompts or parameters on the ranks of an engine that all of them call are an error on each; a rank that should not call it is told so (F12)."""  # noqa: E501
    for name in ("different", "different prompts"):
        for rank, said in enumerate(_both(subject, name)):
            expect(said is None or "Error: " in said, f"{name} on rank {rank} is {said!r}, expected an error")
    expect(_both(subject, "different")[1] is not None, "the second rank was not asked")


@contract.check(603, "shared", probed=False)
def check_an_error_of_one_rank_reaches_the_others(subject: Subject) -> None:
    """A prompt that one rank should not have sent is the same error on all, after which they go on (F17, K10)."""
    first, second = _both(subject, "bad")
    expect(first == second, f"the ranks got {first!r} and {second!r}")
    expect(first.startswith("ConfigError") and str(subject.vocabulary) in first, f"the error is {first!r}")
    expect(_both(subject, "after bad") == _both(subject, "own"), "afterwards the completions are others")


@contract.check(604, "shared", probed=False)
def check_ranks_update_together(subject: Subject) -> None:
    """An update reaches all ranks, also with the caches asleep, and their states and versions are the same (F01, F20)."""  # noqa: E501
    _are_those_of(_both(subject, "updated"), 1, subject, "after an update")
    _are_those_of(_both(subject, "updated again"), 0, subject, "after a sleep at level 2 and an update")
    _are_those_of(_both(subject, "good again"), 1, subject, "after broken updates and a whole one")
    versions = {version for each in _both(subject, "good again") for *_, version in each}
    expect(versions == {3} and _both(subject, "version") == [3, 3], f"after three updates versions are {versions}")
    for name, status in (("asleep", "asleep"), ("missing", "stale"), ("source", "stale")):
        found = _both(subject, f"status, {name}")
        expect(found == [status, status], f"the states of the ranks are {found}, expected {status}")


@contract.check(605, "shared", probed=False)
def check_an_update_that_fails_on_one_rank_fails_on_all(subject: Subject) -> None:
    """A weight that one rank leaves out, or a source that fails on one rank, is a WeightSyncError on all; all are stale until the next whole update (F06, F17, K10)."""  # noqa: E501
    for name, said in (("missing", _both(subject, "name")[0]), ("source", "the disk is gone")):
        for rank, message in enumerate(_both(subject, name)):
            told = message.startswith("WeightSyncError") and said in message
            expect(told, f"{name}: rank {rank} got {message!r}, expected a WeightSyncError with {said!r}")
    for name in ("in its sleep", "stale"):
        for rank, message in enumerate(_both(subject, name)):
            expect("Error: " in message, f"{name}: rank {rank} generated, expected an error")


@contract.check(606, "shared", probed=False)
def check_the_end_of_an_engine_leaves_the_group(subject: Subject) -> None:
    """The process group of the trainer outlives an engine that ranks share (F17)."""
    expect(_both(subject, "status, ended") == ["dead", "dead"], f"{_both(subject, 'status, ended')}")
    expect(_both(subject, "after the end") == [2.0, 2.0], f"a sum over the ranks is {_both(subject, 'after the end')}")
