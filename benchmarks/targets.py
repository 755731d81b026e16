"""What the simulator has promised, as numbers; ``test_targets.py`` asserts them and the table shows them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import engines, models
from benchmarks.iterations import iteration
from benchmarks.measurements import DEADLOCKS, compared, deadlock, many_worlds, start_and_end
from benchmarks.strategies import BACKENDS, RANKS, fake, median, metrics, overhead
from benchmarks.training import commands, shares


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """One promise: ``measured()`` is at most ``limit``.

    Attributes:
        what: what is measured, and in which unit.
        limit: the most it may be.
        measured: measures, or gives what was measured before.
        source: a target, or a guard of what was once reached.
    """

    what: str
    limit: float
    measured: Callable[[], float]
    source: str = "target"

    def __str__(self) -> str:
        return f"{self.what} <= {self.limit:g}"


def _ratio(title: str, name: str, ranks: int, limit: float, source: str = "target") -> Target:
    return Target(
        what=f"{title}, {ranks} ranks, as a fraction of the threaded group",
        limit=limit,
        measured=lambda: compared(name, ranks).ratio,
        source=source,
    )


def _reported(kind: str) -> Target:
    return Target(
        what=f"a deadlock of 1024 ranks is reported: {kind} (s)",
        limit=0.2,
        measured=lambda: _median(deadlock(kind)),
    )


def _training(name: str, speedup: float) -> Target:
    return Target(
        what=f"10 steps of {name}, 8 ranks, from command to exit, as a fraction of torchrun",
        limit=1 / speedup,
        measured=lambda: 1 / commands(name).speedup,
    )


def _overhead(backend: str, ranks: int) -> Target:
    return Target(
        what=f"a training step through the strategy on {backend}, {ranks} rank{'s' * (ranks > 1)}, beside one without",
        limit=1.03,
        measured=lambda: median(overhead(backend, ranks), "ratio"),
    )


def _rollout(engine: str) -> Target:
    return Target(
        what=f"1024 prompts of 256 tokens, 8 ranks, tp=4, gathered, completed by hash, scattered: {engine} (s)",
        limit=0.5,
        measured=lambda: engines.median(engines.rollout(engine), "seconds"),
    )


def _generation(spread: str, limit: float = 1 / 3, source: str = "target") -> Target:
    return Target(
        what=f"a token of the fake engine, 64 prompts, {spread} lengths, as a fraction of transformers.generate",
        limit=limit,
        measured=lambda: engines.median(engines.generation(spread), "ratio"),
        source=source,
    )


def _update(what: str, key: str, limit: float, engine: str = "vllm", source: str = "target") -> Target:
    return Target(
        what=f"update_engine_weights of 100M parameters, fake {engines.FACES[engine]}: {what}",
        limit=limit,
        measured=lambda: engines.median(engines.update(engine), key),
        source=source,
    )


def _median(values: list[float]) -> float:
    return statistics.median(values)


TARGETS = (
    _ratio("all_reduce of 16 floats", "all_reduce", 8, 1.0),
    _ratio("all_reduce of 16 floats", "all_reduce", 64, 1.0),
    _ratio("all_reduce of 16 floats", "all_reduce", 256, 0.5),
    _ratio("all_reduce of 16 floats", "all_reduce", 1024, 0.5),
    _ratio("barrier", "barrier", 8, 1.0),
    _ratio("barrier", "barrier", 64, 1.0),
    _ratio("barrier", "barrier", 256, 0.5),
    _ratio("barrier", "barrier", 1024, 0.5),
    _ratio("all_gather_into_tensor of 16 floats", "all_gather_into_tensor", 1024, 1 / 20),
    _ratio("all_gather of 16 floats into a list", "all_gather", 1024, 0.6, source="guard"),
    _ratio("all_reduce of 1M floats", "all_reduce_big", 8, 0.6),
    Target(
        what="1024 ranks start, meet in a barrier and end (s)",
        limit=2.0,
        measured=lambda: _median(start_and_end("simulated")["first"]),
    ),
    Target(
        what="memory of one of 1024 ranks (MiB)",
        limit=0.3,
        measured=lambda: _median(start_and_end("simulated")["mib_per_rank"]),
    ),
    *(_reported(kind) for kind in DEADLOCKS),
    _training("FSDP2", 5),
    _training("ZeRO-2", 3),
    _training("ZeRO-3", 3),
    Target(
        what="the simulator's own share of the processor time of an FSDP2 step, 8 ranks",
        limit=0.25,
        measured=lambda: _median([each["share"] for each in shares()]),
    ),
    *(_overhead(backend, ranks) for backend in BACKENDS for ranks in RANKS),
    Target(
        what="a step of FakeStrategy, 8 ranks, as a fraction of FSDPV2Strategy",
        limit=1 / 5,
        measured=lambda: median(fake(), "ratio"),
    ),
    Target(
        what="collectives of all_reduce for a dict of 30 metrics, as a fraction of one for each",
        limit=1 / 10,
        measured=lambda: metrics()["dict"] / metrics()["single"],
    ),
    Target(
        what="memory of log-probs of 4096 tokens among 150k, fused with the output layer, as a fraction of plain ones",
        limit=1 / 8,
        measured=lambda: models.fused("mib"),
    ),
    Target(what="and their processor time", limit=1.2, measured=lambda: models.fused("seconds")),
    Target(
        what="a step of an actor on samples of long-tailed lengths, packed, as a fraction of padded",
        limit=1 / 2,
        measured=lambda: median(models.packing(), "ratio"),
    ),
    Target(
        what="what the trainer adds to generation and training, 64 prompts x 8 samples x 512 tokens, as a fraction of "
        "the iteration",
        limit=0.05,
        measured=lambda: iteration()["share"],
    ),
    *(_rollout(engine) for engine in engines.FACES),
    _generation("log-uniform"),
    _generation("uniform", 0.37, source="guard"),  # transformers wastes less on these
    _update("time beside one copy of them", "ratio", 1.5),
    # It makes one bucket flat, as the real one wants it, in memory that it asks for anew.
    _update("time beside one copy of them", "ratio", 20, "sglang", source="guard"),
    *(_update("memory meanwhile, in buckets", "buckets", 2, engine) for engine in engines.FACES),
    *(_update("calls to the engine for each parameter", "calls", 1 / 10, engine) for engine in engines.FACES),
    Target(what="threads left by 900 worlds of 4 ranks", limit=0, measured=lambda: many_worlds()["threads"]),
    Target(
        what="objects left by 900 worlds of 4 ranks, for 100 worlds",
        limit=1,
        measured=lambda: many_worlds()["objects"] / 9,
    ),
    # Half a MiB of it is torch's (see the table), the rest the allocator's before it settles: objects tell the truth.
    Target(
        what="resident memory that 900 worlds of 4 ranks left (MiB)",
        limit=2.0,
        measured=lambda: many_worlds()["mib"],
    ),
)
