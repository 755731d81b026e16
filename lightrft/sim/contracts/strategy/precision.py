"""ST113 and ST114: training in 16 bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lightrft.sim.contracts.strategy import workload
from lightrft.sim.contracts.strategy.capabilities import contract
from lightrft.sim.contracts.strategy.training import accumulating
from lightrft.sim.contracts.strategy.workload import Recipe, Told

if TYPE_CHECKING:
    from lightrft.sim.contracts.strategy.subject import Make, Subject

MIXED = Recipe(optimizer="adamw", steps=3)


def _mixed(make: Make, settings: dict[str, Any]) -> tuple[Told, set[str]]:
    strategy = make(max_norm=0.0, **settings)
    seen: set[str] = set()

    def look(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        seen.add(f"computes in {output.dtype}")

    model = MIXED.model()
    model.head.register_forward_hook(look)
    model, optimizer, _ = strategy.prepare((model, MIXED.make(model.parameters()), None))
    losses, norms = [], []
    for step in range(MIXED.steps):
        (ids,) = workload.micro_batches(strategy, step)
        loss = workload.loss_of(model(ids), ids)
        strategy.backward(loss, model, optimizer)
        norms.append(strategy.optimizer_step(optimizer, model, None) or math.nan)
        losses.append(strategy.all_reduce(loss.item()))
    seen |= {f"gives weights in {weight.dtype}" for _, weight in strategy.full_parameters(model)}
    return Told(losses=losses, norms=norms, weights=workload.weights(strategy, model)), seen


@contract.check(113, "bf16")
def check_bfloat16(subject: Subject) -> None:
    """In bfloat16 the model computes in bfloat16, losses are those of float32 within 0.01, norms within 2 % and what the weights have moved by within 15 %."""  # noqa: E501
    _rounded(subject, {"bf16": True}, torch.bfloat16)


@contract.check(114, "fp16")
def check_float16(subject: Subject) -> None:
    """In float16, with loss scaling, the same holds; norms are without the scale."""
    _rounded(subject, {"fp16": True}, torch.float16)


def _rounded(subject: Subject, settings: dict[str, Any], dtype: torch.dtype) -> None:
    expected = workload.plain(MIXED)
    first = {name: weight.detach() for name, weight in MIXED.model().named_parameters()}
    for found, seen in subject.run(_mixed, {**settings, **accumulating(subject.size, 1)}):
        if seen != {f"computes in {dtype}", f"gives weights in {dtype}"}:
            raise AssertionError(f"expected {dtype}, and the model {', '.join(sorted(seen))}")
        worst = max(abs(one - other) for one, other in zip(found.losses, expected.losses, strict=True))
        if not worst <= 0.01:
            raise AssertionError(f"losses {found.losses}, and {expected.losses} in float32")
        odd = max(abs(one - other) / other for one, other in zip(found.norms, expected.norms, strict=True))
        if not odd <= 0.02:
            raise AssertionError(f"norms {found.norms}, and {expected.norms} in float32")
        off, moved = _distance(found.weights, expected.weights), _distance(expected.weights, first)
        if not off <= 0.15 * moved:
            raise AssertionError(f"weights are {off} away from those in float32, which have moved by {moved}")


def _distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((found[name] - value).square().sum()) for name, value in expected.items()))
