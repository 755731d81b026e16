"""Steps through strategies and without them: ``python -m benchmarks.strategies_child WHAT ...`` prints JSON.

What a rank's thread uses is measured, and added up over the ranks: the simulator's work for it is in it, not waiting.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import workload
from lightrft.strategy import get_strategy

WIDTH, LENGTH, VOCABULARY, BATCH = 256, 64, 512, 4
WARM_UP, STEPS, SEVERAL = 3, 30, 10
SETTINGS = {"FSDP2": {"fsdp": True}, "ZeRO-2": {"zero_stage": 2}, "ZeRO-3": {"zero_stage": 3}}

Step = Callable[[], object]


class Transformer(nn.Module):
    """Large enough that a step is mostly arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True) for _ in range(4)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(x)
        return logits


def loss_of(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def batch() -> torch.Tensor:
    return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))


def through(strategy: Any, model: nn.Module, make_loss: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> Step:
    """One step through ``strategy``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, _ = strategy.prepare((model, optimizer, None))
    ids = batch()

    def step() -> None:
        strategy.backward(make_loss(model, ids), model, optimizer)
        strategy.optimizer_step(optimizer, model, None)

    return step


def direct(backend: str, strategy: Any) -> Step:
    """The same written on the backend itself, which the strategy has set up."""
    model = Transformer()
    ids = batch()
    if backend == "FSDP2":
        return _direct_fsdp(model, ids)
    import deepspeed

    from lightrft.strategy.deepspeed.deepspeed_utils import training_config
    from lightrft.strategy.deepspeed.parameters import size_of

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ranks = strategy.world_size
    settings = training_config(strategy.config, size_of(model), shard_size=-1, world_size=ranks, accumulation=1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step() -> None:
        engine.backward(loss_of(engine, ids))
        engine.step()

    return step


def _direct_fsdp(model: nn.Module, ids: torch.Tensor) -> Step:
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        loss_of(model, ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _several(step: Step) -> Step:
    """Some steps in a row, so that each finds in the processor's caches what it left there, as in training."""

    def steps() -> None:
        for _ in range(SEVERAL):
            step()

    return steps


def _in_turns(steps: dict[str, Step]) -> dict[str, list[float]]:
    """Milliseconds of processor time that this rank used in each step."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + STEPS):
        for name, step in steps.items():
            begin = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
            step()
            times[name].append((time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID) - begin) * 1e3)
    return {name: measured[WARM_UP:] for name, measured in times.items()}


def _compared(ranks: list[dict[str, list[float]]]) -> dict[str, float]:
    """Medians of the steps of all ranks together; and the median over neighbours of the ratio of first to second."""
    totals = {name: [sum(each) for each in zip(*(rank[name] for rank in ranks), strict=True)] for name in ranks[0]}
    first, second = totals.values()
    found = {name: statistics.median(measured) for name, measured in totals.items()}
    return {**found, "ratio": statistics.median(one / other for one, other in zip(first, second, strict=True))}


def overhead(backend: str, ranks: str) -> dict[str, float]:
    """``strategy`` and ``direct``."""

    def on_rank() -> dict[str, float]:
        strategy = get_strategy(
            {"train_batch_size": int(ranks) * BATCH, "micro_train_batch_size": BATCH, **SETTINGS[backend]}
        )
        steps = {"strategy": through(strategy, Transformer(), loss_of), "direct": direct(backend, strategy)}
        found = _in_turns(steps)
        dist.destroy_process_group()
        return found

    return _compared(SimWorld(int(ranks)).run(on_rank))


def fake(strategy: str) -> float:
    """Milliseconds of a step of 8 ranks on a model as small as tests have, on FSDP2 or on the ``fake`` strategy.

    Each is measured in a world that has nothing else, as a test has it: what FSDP2 keeps would slow down the fake too.
    """

    def loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        ids = ids[:, :8] % workload.VOCABULARY
        return workload.loss_of(model(ids), ids)

    def on_rank() -> list[float]:
        settings = {"train_batch_size": 8, "fsdp": True}
        chosen = get_strategy({**settings, "strategy": "fake"} if strategy == "fake" else settings)
        times = _in_turns({strategy: _several(through(chosen, workload.transformer(), loss))})[strategy]
        dist.destroy_process_group()
        return times

    return statistics.median(map(sum, zip(*SimWorld(8).run(on_rank), strict=True))) / SEVERAL


def metrics() -> dict[str, float]:
    """Collectives of one rank for 30 metrics."""

    def on_rank(together: bool) -> None:
        strategy = get_strategy({"strategy": "fake", "train_batch_size": 4})
        several = {f"metric_{index}": float(index) for index in range(30)}
        if together:
            strategy.all_reduce(several)
        else:
            for value in several.values():
                strategy.all_reduce(value)
        dist.destroy_process_group()

    found = {}
    for name, together in (("dict", True), ("single", False)):
        world = SimWorld(4)
        world.run(on_rank, together)
        found[name] = float(sum(event.rank == 0 and event.operation == "all_reduce" for event in world.trace))
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    what, *arguments = sys.argv[1:]
    print(json.dumps({"overhead": overhead, "fake": fake, "metrics": metrics}[what](*arguments)))
