"""Starting DeepSpeed: its communication, what it may compile, what a CPU may compute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["adam_class", "connect", "fp16_allowed", "launch_forward", "launched"]


def connect() -> None:
    """Let DeepSpeed use the process group of this process.

    DeepSpeed compiles nothing here: its all-reduce in shared memory, which it would compile for minutes, is used only
    if it was built when DeepSpeed was installed.
    """
    import deepspeed

    if not _is_built("deepspeed_shm_comm"):
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _is_built(name: str) -> bool:
    """Whether an operation is there without being compiled now."""
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder.builder import OpBuilder

    return bool(installed_ops.get(name)) or name in OpBuilder._loaded_ops


def adam_class(*, offload: bool) -> type[Optimizer]:
    """The fastest AdamW that is there: DeepSpeed's own if it is built, or can be for CUDA, else PyTorch's.

    Args:
        offload: the optimizer's states, and its step, are on the CPU.
    """
    name = "cpu_adam" if offload else "fused_adam"
    if not (_is_built(name) or _compiles_for_cuda()):
        return torch.optim.AdamW
    from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

    found: type[Optimizer] = DeepSpeedCPUAdam if offload else FusedAdam
    return found


def _compiles_for_cuda() -> bool:
    from torch.utils.cpp_extension import CUDA_HOME

    return torch.cuda.is_available() and CUDA_HOME is not None


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


@contextmanager
def launched(device: torch.device) -> Iterator[None]:
    """Tell DeepSpeed which GPU is this process's, while it works: it reads that in ``LOCAL_RANK``.

    That variable may be missing (Slurm, a process alone), or count GPUs that the launcher does not show.
    """
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = _local_rank(device)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before


def launch_forward(module: torch.nn.Module, device: torch.device) -> None:
    """Do so in each forward pass of ``module`` too, where DeepSpeed reads it at stage 3."""
    if os.environ.get("LOCAL_RANK") == _local_rank(device):
        return
    entered: list[AbstractContextManager[None]] = []

    def enter(*_: object) -> None:
        entered.append(launched(device))
        entered[-1].__enter__()

    def leave(*_: object) -> None:
        entered.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(enter, prepend=True)
    module.register_forward_hook(leave, always_call=True)


def _local_rank(device: torch.device) -> str:
    return str(device.index or 0) if device.type == "cuda" else os.environ.get("LOCAL_RANK", "0")
