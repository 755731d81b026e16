"""Gather prompts in the group of an engine, generate, give every rank its own completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from lightrft.errors import EngineStateError
from lightrft.strategy import packing
from lightrft.strategy.request_seeds import content_of, digest_of
from lightrft.strategy.sampling import SamplingParams
from lightrft.strategy.utils.agreement import Ranks, check_same

if TYPE_CHECKING:
    from lightrft.strategy.engine import RolloutEngine
    from lightrft.strategy.requests import Request

__all__ = ["gather_and_generate", "generate_alike"]


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
    alone = ranks.world_size == 1
    with ranks.together("prompts were not gathered", EngineStateError) as outcome:
        requests, told = _read(make_requests, sampling_params)
        data = packing.packed([] if alone else requests)
        outcome.mine = told, len(requests), len(data)
    check_same([told for told, *_ in outcome.all], "prompts were not gathered")
    counts, sizes = [count for _, count, _ in outcome.all], [size for *_, size in outcome.all]
    everyone = packing.sent(data, sizes, ranks, device, to_all=engine.runs_on_all_ranks)
    completions: list[Any] = []
    with ranks.together("generation failed", EngineStateError) as outcome:
        if not alone:
            requests = [request for each in everyone for request in packing.unpacked(each)]
        if requests and (engine.runs_on_all_ranks or ranks.rank == 0):
            completions = engine.generate(requests, sampling_params)
            outcome.mine = _samples(completions, requests)
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
    with ranks.together("nothing was generated", EngineStateError) as outcome:
        requests, told = _read(make_requests, sampling_params)
        if not engine.runs_on_all_ranks:  # else the engine compares them
            told["the digest of prompts"] = digest_of([content_of(one) for one in requests])
        outcome.mine = told
    check_same(outcome.all, "nothing was generated")
    completions: list[Any] = []
    with ranks.together("generation failed", EngineStateError) as outcome:
        if engine.runs_on_all_ranks or ranks.rank == 0:
            completions = engine.generate(requests, sampling_params)
            outcome.mine = None if engine.runs_on_all_ranks else completions
    return completions if engine.runs_on_all_ranks else list(outcome.all[0])


def _read(make_requests: Callable[[], Sequence[Request]], sampling_params: Any) -> tuple[list[Request], dict[str, str]]:
    """The requests of this rank, and what has to be the same on all.

    What may be wrong on one rank alone is found here, and not in an engine, where the others would wait for that rank.
    """
    requests = list(make_requests())
    return requests, {"sampling_params": repr(SamplingParams.of(sampling_params))}


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
