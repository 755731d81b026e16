"""What vLLM is started with."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from lightrft.strategy.engine_settings import EngineSettings
    from lightrft.strategy.model_files import ModelFiles

__all__ = ["environment", "llm_arguments", "log_probs_mode"]

_CPU_CACHE_BYTES = 256 << 20
"""Of the KV cache on a CPU, where a share of the memory would be one of everybody's."""


def llm_arguments(
    settings: EngineSettings, files: ModelFiles, known: Collection[str], *, grouped: bool
) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``; ``settings.options`` win over what follows from the rest.

    Args:
        settings: of the engine.
        files: of its model. Without a tokenizer beside it the engine has none.
        known: arguments that this vLLM has. Those that it lacks are left out, where it does without.
        grouped: whether there is a default process group, whose ranks share engines. vLLM makes its groups in it then.
    """
    arguments: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "tensor_parallel_size": settings.tp_size,
        "max_model_len": settings.max_model_len,
        "seed": settings.seed,
    }
    if files.has_tokenizer is False:
        arguments["skip_tokenizer_init"] = True
    if grouped:
        arguments["distributed_executor_backend"] = "external_launcher"
    if "logprobs_mode" in known:
        arguments["logprobs_mode"] = "processed_logprobs"
    if settings.device.type == "cpu":
        arguments["enforce_eager"] = True
        # Of a prompt that is cut, vLLM winds the generator back after each part, which those of a CPU cannot do.
        arguments["enable_chunked_prefill"] = False
        if "kv_cache_memory_bytes" in known:
            arguments["kv_cache_memory_bytes"] = _CPU_CACHE_BYTES
    else:
        arguments["gpu_memory_utilization"] = settings.memory_share
        arguments["enable_sleep_mode"] = settings.sleeps
    return {**arguments, **settings.options}


def environment(settings: EngineSettings, rank: int | None) -> dict[str, str]:
    """Environment variables that vLLM needs, beside those of the process.

    Args:
        settings: of the engine.
        rank: in the default group; ``None`` without one.
    """
    needed = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine runs in this process
    if rank is not None:
        needed |= {"RANK": str(rank), "LOCAL_RANK": str(settings.device.index or 0)}
    return needed


def log_probs_mode(arguments: dict[str, Any]) -> Literal["raw", "processed"]:
    """Of which distribution log-probs are; a vLLM that cannot be asked gives raw ones.

    Raises:
        ConfigError: it is asked for logits.
    """
    mode = arguments.get("logprobs_mode", "raw_logprobs")
    if mode not in ("raw_logprobs", "processed_logprobs"):
        raise ConfigError(f"engine_options logprobs_mode={mode!r}: expected 'processed_logprobs' or 'raw_logprobs'")
    return "raw" if mode == "raw_logprobs" else "processed"
