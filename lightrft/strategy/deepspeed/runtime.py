"""Starting DeepSpeed: its communication, what it may compile, what a CPU may compute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["adam_class", "connect", "fp16_allowed"]


def connect() -> None:
    """Let DeepSpeed use the process group of this process; one that is alone gets a group of its own. *Collective*.

    DeepSpeed compiles nothing here: its all-reduce in shared memory, which it would compile for minutes, is used only
    if it was built when DeepSpeed was installed.
    """
    import deepspeed

    os.environ.setdefault("LOCAL_RANK", "0")  # of a process that no launcher started; DeepSpeed insists on it
    if not _is_built("deepspeed_shm_comm"):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized():
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def _is_built(name: str) -> bool:
    """Whether an operation is there without being compiled now."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.builder import OpBuilder

    return bool(installed_ops.get(name)) or name in OpBuilder._loaded_ops


def adam_class(*, offload: bool) -> type[Optimizer]:
    """The fastest AdamW that is there without compiling on this machine; with CUDA DeepSpeed's own are compiled once.

    Args:
        offload: the optimizer's states, and its step, are on the CPU.
    """
    name = "cpu_adam" if offload else "fused_adam"
    if not (_is_built(name) or torch.cuda.is_available()):
        return torch.optim.AdamW
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    found: Any = DeepSpeedCPUAdam if offload else FusedAdam
    return found


@contextmanager
def fp16_allowed() -> Iterator[None]:
    """Let DeepSpeed use fp16 on CPUs that compute it slowly, which it refuses; for as long as an engine is built."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.is_fp16_supported() or accelerator.device_name() != "cpu":
        yield
        return
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported
