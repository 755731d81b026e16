"""Gather prompts in the group of an engine, generate, give every rank its own completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightrft.errors import EngineStateError
from lightrft.strategy.requests import Request
from lightrft.strategy.sampling import SamplingParams
from lightrft.strategy.utils import collectives
from lightrft.strategy.utils.agreement import Ranks, check_same

if TYPE_CHECKING:
    from lightrft.strategy.engine import RolloutEngine

__all__ = ["gather", "gather_and_generate", "generate_alike"]


def gather_and_generate(
    engine: RolloutEngine,
    make_requests: Callable[[], Sequence[Request]],
    sampling_params: Any,
    *,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> list[Any]:
    """The completions of this rank's requests, in their order; those of one prompt follow each other. *Collective*.

    Args:
        engine: shared by the ranks of ``group``, awake.
        make_requests: those of this rank; any number, also none. What it raises is raised on every rank.
        sampling_params: the same on all ranks of the group.
        group: the ranks of the engine; ``None`` for a rank alone.
        device: where tensors of the group travel.

    Raises:
        ConfigError: the sampling parameters are wrong on some rank, or not the same on all.
        LightRFTError: generation failed on some rank; the same error on every rank of the group.
    """
    ranks = Ranks(group) if group is not None else Ranks(rank=0, world_size=1)
    requests, are_tokens = _read(make_requests, sampling_params, ranks)
    shared = gather(requests, ranks, device, are_tokens=are_tokens)
    counts = [len(each) for each in shared]
    everything = [request for each in shared for request in each]
    leads = engine.runs_on_all_ranks or ranks.rank == 0
    completions: list[Any] = []
    with ranks.together("generation failed", EngineStateError) as outcome:
        if everything and leads:
            completions = engine.generate(everything, sampling_params)
            outcome.mine = _samples(completions, everything)
    samples = next((one for one in outcome.all if one is not None), 0)
    first = sum(counts[: ranks.rank]) * samples
    last = first + counts[ranks.rank] * samples
    if engine.runs_on_all_ranks:
        return completions[first:last]
    return _scattered(completions, counts, samples, ranks)


def generate_alike(
    engine: RolloutEngine,
    make_requests: Callable[[], Sequence[Request]],
    sampling_params: Any,
    *,
    group: dist.ProcessGroup | None,
) -> list[Any]:
    """The completions of requests that all ranks of the engine pass alike, on each of them. *Collective*.

    Raises:
        ConfigError: the sampling parameters are wrong on some rank, or not the same on all.
        LightRFTError: generation failed on some rank; the same error on every rank of the group.
    """
    ranks = Ranks(group) if group is not None else Ranks(rank=0, world_size=1)
    requests, _ = _read(make_requests, sampling_params, ranks)
    completions: list[Any] = []
    with ranks.together("generation failed", EngineStateError) as outcome:
        if engine.runs_on_all_ranks or ranks.rank == 0:
            completions = engine.generate(requests, sampling_params)
            outcome.mine = None if engine.runs_on_all_ranks else completions
    return completions if engine.runs_on_all_ranks else list(outcome.all[0])


def _read(
    make_requests: Callable[[], Sequence[Request]], sampling_params: Any, ranks: Ranks
) -> tuple[list[Request], bool]:
    """The requests of this rank, and whether those of all ranks are token ids alone. *Collective*.

    What may be wrong on one rank alone is found here, and not in an engine, where the others would wait for that rank.
    """
    with ranks.together("prompts were not gathered", EngineStateError) as outcome:
        requests = list(make_requests())
        told = {"sampling_params": repr(SamplingParams.of(sampling_params))}
        outcome.mine = all(request.is_tokens for request in requests), told
    check_same([told for _, told in outcome.all], "prompts were not gathered")
    return requests, all(are_tokens for are_tokens, _ in outcome.all)


def _samples(completions: Sequence[Any], requests: Sequence[Request]) -> int:
    samples, rest = divmod(len(completions), len(requests))
    if rest or not samples:
        raise EngineStateError(f"the engine returned {len(completions)} completions for {len(requests)} prompts")
    return samples


def _scattered(completions: list[Any], counts: Sequence[int], samples: int, ranks: Ranks) -> list[Any]:
    """Rank 0 of the group hands every rank its share."""
    if ranks.world_size == 1:
        return completions
    shares: list[Any] | None = None
    if ranks.rank == 0:
        ends = [sum(counts[: index + 1]) * samples for index in range(len(counts))]
        shares = [completions[end - count * samples : end] for count, end in zip(counts, ends, strict=True)]
    mine: list[Any] = [None]
    dist.scatter_object_list(mine, shares, group=ranks.group, group_src=0)
    return list(mine[0])


def gather(requests: list[Request], ranks: Ranks, device: torch.device, *, are_tokens: bool) -> list[list[Request]]:
    """The requests of every rank, by rank. *Collective*.

    Token ids travel as tensors; requests with text, images or videos on some rank are pickled.
    """
    if ranks.world_size == 1:
        return [requests]
    if not are_tokens:
        return [list(each) for each in ranks.gather(tuple(requests))]
    lengths = [len(request.prompt_token_ids or ()) for request in requests]
    found = collectives.all_gather(
        {
            "count": len(requests),
            "lengths": torch.tensor(lengths, dtype=torch.int64),
            "tokens": torch.tensor([t for r in requests for t in r.prompt_token_ids or ()], dtype=torch.int64),
        },
        group=ranks.group,
        device=device,
    )
    return _unpacked(found["count"].tolist(), found["lengths"].tolist(), found["tokens"].tolist())


def _unpacked(counts: list[int], lengths: list[int], tokens: list[int]) -> list[list[Request]]:
    shared: list[list[Request]] = []
    prompt = offset = 0
    for count in counts:
        mine = []
        for length in lengths[prompt : prompt + count]:
            mine.append(Request(prompt_token_ids=tuple(tokens[offset : offset + length])))
            offset += length
        prompt += count
        shared.append(mine)
    return shared
