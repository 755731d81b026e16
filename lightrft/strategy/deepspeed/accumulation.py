"""Gradients that DeepSpeed keeps between the micro-batches of one optimizer step."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["clear_buffers", "complete", "end_micro_batch", "forget"]


def forget(engine: Any) -> None:
    """Drop the gradients of micro-batches that have not led to an optimizer step, wherever DeepSpeed keeps them."""
    optimizer = engine.optimizer
    optimizer.zero_grad()  # at stage 3 it also begins to count micro-batches anew
    if engine.zero_optimization_stage() != 3:
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
        if optimizer.cpu_offload:
            optimizer.reset_cpu_buffers()
            optimizer._offload_accumulated_param_ids = set()
    clear_buffers(optimizer)


@torch.no_grad()
def clear_buffers(optimizer: Any) -> None:
    """Zero the buffers in which DeepSpeed gathers the gradients of one step.

    A parameter that the loss of the next step does not reach writes nothing into them: DeepSpeed would step it with
    its last gradient.
    """
    for buffer in _buffers(optimizer):
        buffer.zero_()


def _buffers(optimizer: Any) -> list[torch.Tensor]:
    if _is_stage3(optimizer):
        masters, found = optimizer.fp32_partitioned_groups_flat, [optimizer.grad_partitions_flat_buffer]
    else:
        masters = optimizer.single_partition_of_fp32_groups
        found = list(optimizer.accumulated_grads_in_cpu.values()) if optimizer.cpu_offload else []
    return [*found, *(master.grad for master in masters if master.grad is not None)]


def complete(engine: Any) -> None:
    """Hand over to an optimizer on the CPU the gradients that the last micro-batch before a step did not add to.

    DeepSpeed itself hands over only those of parameters that the last micro-batch reached.
    """
    optimizer = engine.optimizer
    if not engine.zero_use_cpu_optimizer():
        return
    done = optimizer.norm_for_param_grads.keys()
    if _is_stage3(optimizer):
        ids = {p.ds_id for group in optimizer.fp16_groups for p in group if optimizer.get_param_id(p) in done}
        optimizer._offload_boundary_param_ids -= ids
        optimizer._finalize_offload_gradient_accumulation()
    else:
        optimizer._offload_accumulated_param_ids -= done
        optimizer._finalize_cpu_offload_gradient_accumulation()


def end_micro_batch(optimizer: Any) -> None:
    """Count a micro-batch. At stage 3 DeepSpeed does so when the engine is called next, which not every loss needs."""
    if _is_stage3(optimizer):
        optimizer.clear_backward_seen_flag()


def _is_stage3(optimizer: Any) -> bool:
    return hasattr(optimizer, "fp16_groups")
