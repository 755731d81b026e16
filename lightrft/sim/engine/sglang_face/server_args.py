"""``sglang.ServerArgs``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

from lightrft.sim.engine.lacking import CODE, MEMORY, ORDER, SPEED, Refusing, Surface
from lightrft.sim.engine.sglang_face.more_server_args import MORE

__all__ = ["ServerArgs", "check", "length"]

ARGUMENTS = Surface(
    engine="SGLang",
    honoured=frozenset(
        {
            "model_path", "tokenizer_path", "skip_tokenizer_init", "load_format", "context_length", "dtype", "tp_size",
            "random_seed", "disable_radix_cache", "enable_memory_saver", "enable_weights_cpu_backup",
            "enable_deterministic_inference", "rl_on_policy_target", "weight_version", "custom_weight_loader",
        }
    ),
    idle={
        "mem_fraction_static": MEMORY, "max_total_tokens": MEMORY,
        "attention_backend": SPEED, "mm_attention_backend": SPEED, "sampling_backend": SPEED,
        "disable_cuda_graph": SPEED, "device": "where it is computed", "base_gpu_id": "where it is computed",
        "max_running_requests": ORDER,
        "log_level": "what is logged",
        "custom_sigquit_handler": "what happens when one of its processes fails: it has none",
        "trust_remote_code": CODE,
    },
    values={"load_format": ("safetensors", "dummy")},
)  # fmt: skip


_LENGTH = 2048
"""Most tokens where neither the model nor an argument says it."""

_SHORTEST = 2
"""SGLang keeps one position of the context free, and needs another."""

_BACKENDS = (
    "triton", "torch_native", "flex_attention", "dsa", "nsa", "qsa", "dsv4", "compressed", "fa3", "fa4", "flashinfer",
    "llada2_cfg_flashinfer", "flashmla", "trtllm_mla", "cutedsl_mla", "tokenspeed_mla", "trtllm_mha", "hpc_ops",
    "minicpm_flashattn", "minicpm_flashinfer", "aiter", "wave", "intel_amx", "ascend", "intel_xpu",
)  # fmt: skip
"""How SGLang computes attention."""


@dataclass
class _Taken(Refusing):
    """Settings of an engine: those of SGLang that trainers use.

    Raises:
        ConfigError: one has a value that the fake engine lacks.
    """

    _engine = "SGLang"

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

    def __post_init__(self) -> None:
        defaults = {one.name: one.default for one in fields(self)} | MORE
        ARGUMENTS.check({name: getattr(self, name) for name in defaults}, defaults)


def check(given: _Taken) -> None:
    """Refuse what SGLang does not start with.

    Raises:
        ValueError: there are no ranks.
        RuntimeError: its scheduler would die of a value.
    """
    if given.tp_size < 1:
        raise ValueError(f"tp_size={given.tp_size}: expected 1 or more")
    if given.attention_backend not in (None, *_BACKENDS):
        raise RuntimeError(
            f"the scheduler died: attention_backend={given.attention_backend!r}, expected one of {', '.join(_BACKENDS)}"
        )


def length(asked: int | None, most: int | None) -> int:
    """Most tokens of a prompt and its completion.

    Args:
        asked: ``context_length``; ``None`` leaves it to the model.
        most: that the model was made for, if it is known.

    Raises:
        ValueError: the model was made for fewer, and ``SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN`` is not set.
        RuntimeError: it leaves no room for anything.
    """
    if asked is None:
        return most or _LENGTH
    allowed = os.environ.get("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "").lower() in ("1", "true", "yes", "y")
    if most is not None and asked > most and not allowed:
        raise ValueError(
            f"context_length ({asked}) is greater than the derived context_length ({most}): lower it, or set the "
            "environment variable SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1"
        )
    if asked < _SHORTEST:
        raise RuntimeError(f"the scheduler died: context_length={asked}, expected {_SHORTEST} or more")
    return asked


def _field(value: Any) -> Any:
    return field(default_factory=list) if value == [] else field(default=value)


ServerArgs = make_dataclass("ServerArgs", [(name, Any, _field(MORE[name])) for name in MORE], bases=(_Taken,))
ServerArgs.__module__ = "sglang.srt.server_args"
