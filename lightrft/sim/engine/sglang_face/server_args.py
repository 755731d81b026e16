"""``sglang.ServerArgs``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["ServerArgs"]


@dataclass
class ServerArgs:
    """Settings of an engine: those of SGLang that trainers use. They choose a model; the rest is for real ones."""

    model_path: str
    tokenizer_path: str | None = None
    skip_tokenizer_init: bool = False
    load_format: str = "auto"
    trust_remote_code: bool = False
    context_length: int | None = None
    dtype: str = "auto"
    device: str | None = None
    tp_size: int = 1
    base_gpu_id: int = 0
    random_seed: int | None = None
    log_level: str = "info"
    mem_fraction_static: float | None = None
    max_total_tokens: int | None = None
    max_running_requests: int | None = None
    attention_backend: str | None = None
    mm_attention_backend: str | None = None
    sampling_backend: str | None = None
    disable_cuda_graph: bool = False
    disable_radix_cache: bool = False
    enable_memory_saver: bool = False
    enable_weights_cpu_backup: bool = False
    enable_deterministic_inference: bool = False
    rl_on_policy_target: str | None = None
    custom_sigquit_handler: Callable[..., Any] | None = None
    weight_version: str = "default"
    custom_weight_loader: list[str] | None = None


ServerArgs.__module__ = "sglang.srt.server_args"
