"""Gradients that DeepSpeed keeps between the micro-batches of one optimizer step."""

from __future__ import annotations

from typing import Any

__all__ = ["forget"]


def forget(engine: Any) -> None:
    """Drop the gradients of micro-batches that have not led to an optimizer step, wherever DeepSpeed keeps them."""
    optimizer = engine.optimizer
    optimizer.zero_grad()
    if engine.zero_optimization_stage() == 3:
        return
    optimizer.micro_step_id = -1  # counted from here at the first gradient of each micro-batch
    for name in ("averaged_gradients", "all_grad_tensors"):
        kept = getattr(optimizer, name)
        kept.update(dict.fromkeys(kept))
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids = set()
