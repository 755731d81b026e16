"""The compiled operations of DeepSpeed, answered with torch.

DeepSpeed compiles C++ when an operation is first used, which takes minutes, and one of them shares memory between
processes. On simulated ranks the optimizers' operations are computed by torch, with the same interface, and no other is
compiled: the compiler is as much at the edge as the accelerator it compiles for.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightrft.errors import RefusedError

__all__ = ["CpuAdam", "FusedAdam", "install"]


def install() -> None:
    """Offer the operations below as loaded, all others as unavailable, refuse to compile, and allow fp16."""
    builders = sys.modules.get("deepspeed.ops.op_builder.builder")
    ops = sys.modules.get("deepspeed.ops")
    if builders is None or ops is None:
        return
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    builders.OpBuilder._loaded_ops.update({operation.name: operation for operation in (FusedAdam(), CpuAdam())})
    builders.OpBuilder.jit_load = _refuse_to_compile
    accelerator = sys.modules.get("deepspeed.accelerator.cpu_accelerator")
    if accelerator is not None:  # torch computes in fp16 on any CPU, DeepSpeed asks whether that is fast
        accelerator.CPU_Accelerator.is_fp16_supported = _true
    vars(ops)["__compatible_ops__"] = dict.fromkeys(ALL_OPS, False) | {"fused_adam": True, "cpu_adam": True}


def _true(accelerator: Any) -> bool:  # noqa: ARG001
    return True


def _refuse_to_compile(builder: Any, verbose: bool = True) -> Any:  # noqa: ARG001 - DeepSpeed's signature
    raise RefusedError(
        f"DeepSpeed's operation {builder.name!r} would be compiled, and simulated ranks have no compiled operations "
        "but those of FusedAdam and DeepSpeedCPUAdam: use an optimizer of torch.optim, or leave out what needs it"
    )


class FusedAdam:
    """The operation of ``deepspeed.ops.adam.FusedAdam``."""

    name = "fused_adam"

    @torch.no_grad()
    def multi_tensor_adam(
        self,
        chunk_size: int,  # noqa: ARG002 - for kernels
        overflow: Tensor,  # noqa: ARG002 - never written by this operation
        tensors: Sequence[Sequence[Tensor]],
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        step: int,
        decoupled: int,
        bias_correction: int,
        weight_decay: float,
    ) -> None:
        """One step of Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019, if ``decoupled``) in fp32.

        ``tensors`` are gradients, parameters, first and second moments: four lists of equal length, of which the last
        three are written. ``step`` counts from 1.
        """
        for gradient, parameter, mean, square in zip(*tensors, strict=True):
            _adam(
                parameter,
                gradient,
                mean,
                square,
                lr=lr,
                betas=(beta1, beta2),
                eps=eps,
                step=step,
                weight_decay=weight_decay,
                decoupled=bool(decoupled),
                bias_correction=bool(bias_correction),
            )


class CpuAdam:
    """The operation of ``deepspeed.ops.adam.DeepSpeedCPUAdam``."""

    name = "cpu_adam"

    def __init__(self) -> None:
        self._decoupled: dict[int, bool] = {}

    def create_adam(
        self,
        optimizer_id: int,
        lr: float,  # noqa: ARG002 - comes again with every update, as do the next four
        beta1: float,  # noqa: ARG002
        beta2: float,  # noqa: ARG002
        eps: float,  # noqa: ARG002
        weight_decay: float,  # noqa: ARG002
        adamw_mode: bool,
        should_log: bool,  # noqa: ARG002
    ) -> int:
        """Remember whether the weight decay of this optimizer is decoupled."""
        self._decoupled[optimizer_id] = bool(adamw_mode)
        return 0

    def destroy_adam(self, optimizer_id: int) -> int:  # noqa: ARG002 - another rank may have one of the same number
        """Do nothing: what is kept is one flag."""
        return 0

    @torch.no_grad()
    def adam_update(
        self,
        optimizer_id: int,
        step: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        bias_correction: bool,
        parameter: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
    ) -> int:
        """One step, as :meth:`FusedAdam.multi_tensor_adam` takes it, for one parameter."""
        _adam(
            parameter,
            gradient,
            mean,
            square,
            lr=lr,
            betas=(beta1, beta2),
            eps=eps,
            step=step,
            weight_decay=weight_decay,
            decoupled=self._decoupled[optimizer_id],
            bias_correction=bool(bias_correction),
        )
        return 0


def _adam(
    parameter: Tensor,
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: int,
    weight_decay: float,
    decoupled: bool,
    bias_correction: bool,
) -> None:
    value, slope = parameter.float(), gradient.float()
    if weight_decay and not decoupled:
        slope = slope + weight_decay * value
    first = torch.lerp(slope, mean.float(), betas[0])
    second = torch.lerp(slope * slope, square.float(), betas[1])
    correction1 = 1 - betas[0] ** step if bias_correction else 1.0
    correction2 = 1 - betas[1] ** step if bias_correction else 1.0
    update = (first / correction1) / ((second / correction2).sqrt() + eps)
    if weight_decay and decoupled:
        update = update + weight_decay * value
    parameter.copy_(value - lr * update)
    mean.copy_(first)
    square.copy_(second)
