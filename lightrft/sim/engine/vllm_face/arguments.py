"""Arguments of ``vllm.LLM`` and ``vllm.EngineArgs``, and what the fake engine makes of them."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from lightrft.sim.engine.lacking import CODE, MEMORY, ORDER, SPEED, Refusing, Surface

__all__ = ["ARGUMENTS", "EngineArgs", "length", "read", "signature"]

_NAMED: dict[str, Any] = {
    "runner": "auto",
    "convert": "auto",
    "tokenizer": None,
    "tokenizer_mode": "auto",
    "skip_tokenizer_init": False,
    "trust_remote_code": False,
    "allowed_local_media_path": "",
    "allowed_media_domains": None,
    "tensor_parallel_size": 1,
    "dtype": "auto",
    "quantization": None,
    "revision": None,
    "tokenizer_revision": None,
    "chat_template": None,
    "seed": 0,
    "gpu_memory_utilization": 0.92,
    "cpu_offload_gb": 0,
    "offload_group_size": 0,
    "offload_num_in_group": 1,
    "offload_prefetch_step": 1,
    "offload_params": None,
    "enforce_eager": False,
    "enable_return_routed_experts": False,
    "return_sampling_mask": False,
    "disable_custom_all_reduce": False,
    "hf_token": None,
    "hf_overrides": None,
    "mm_processor_kwargs": None,
    "pooler_config": None,
    "structured_outputs_config": None,
    "profiler_config": None,
    "attention_config": None,
    "kv_cache_memory_bytes": None,
    "compilation_config": None,
    "quantization_config": None,
    "logits_processors": None,
    "spec_method": None,
    "spec_model": None,
    "spec_tokens": None,
}
"""Arguments of the constructor that it names; it takes the others of ``EngineArgs`` too."""

_MORE: dict[str, Any] = {
    "distributed_executor_backend": None,
    "enable_prefix_caching": None,
    "enable_sleep_mode": False,
    "limit_mm_per_prompt": None,
    "load_format": "auto",
    "logprobs_mode": "raw_logprobs",
    "max_model_len": None,
    "max_num_batched_tokens": None,
    "max_num_seqs": None,
    "disable_log_stats": True,
    "worker_extension_cls": "",
    "enable_chunked_prefill": None,
    "block_size": None,
    "generation_config": "auto",
    "override_generation_config": None,
    "async_scheduling": None,
}
"""Those of ``EngineArgs`` alone."""

_LENGTH = 2048
"""Most tokens where neither the model nor an argument says it."""

_FOLDER = "which files are fetched: models are read from folders"

ARGUMENTS = Surface(
    engine="vLLM",
    honoured=frozenset(
        {
            "runner", "convert", "tokenizer", "skip_tokenizer_init", "tensor_parallel_size", "dtype", "seed",
            "distributed_executor_backend", "enable_prefix_caching", "limit_mm_per_prompt", "load_format",
            "logprobs_mode", "max_model_len", "generation_config",
        }
    ),
    idle={
        "gpu_memory_utilization": MEMORY, "cpu_offload_gb": MEMORY, "offload_group_size": MEMORY,
        "offload_num_in_group": MEMORY, "offload_prefetch_step": MEMORY, "offload_params": MEMORY,
        "kv_cache_memory_bytes": MEMORY, "block_size": MEMORY,
        "enforce_eager": SPEED, "disable_custom_all_reduce": SPEED, "compilation_config": SPEED,
        "attention_config": SPEED, "profiler_config": "what is measured", "disable_log_stats": "what is logged",
        "max_num_batched_tokens": ORDER, "max_num_seqs": ORDER, "enable_chunked_prefill": ORDER,
        "async_scheduling": ORDER,
        "revision": _FOLDER, "tokenizer_revision": _FOLDER, "hf_token": _FOLDER,
        "trust_remote_code": CODE,
        "allowed_local_media_path": "which files chats may show: there are no chats",
        "allowed_media_domains": "which addresses chats may show: there are no chats",
        "chat_template": "the form of chats: there are none",
        "enable_sleep_mode": "whether memory can be freed: sleeping changes the state alone, as on a CPU",
    },
    values={
        "runner": ("generate",),
        "convert": ("none",),
        "load_format": ("safetensors", "dummy"),
        "logprobs_mode": ("processed_logprobs",),
        "generation_config": ("vllm",),
    },
)  # fmt: skip
"""``distributed_executor_backend`` and ``tensor_parallel_size`` are checked where the ranks of an engine are found."""

_LACKING: dict[str, Any] = {
    "_api_process_count": 1, "_api_process_rank": 0, "additional_config": {}, "aggregate_engine_logging": False,
    "all2all_backend": "allgather_reducescatter", "allow_deprecated_quantization": False, "attention_backend": None,
    "aux_output_config": None, "code_revision": None, "collect_detailed_traces": None, "config_format": "auto",
    "cp_kv_cache_interleave_size": None, "cpu_distributed_timeout_seconds": None, "cpu_offload_params": set(),
    "cudagraph_capture_sizes": None, "cudagraph_metrics": False, "custom_histogram_buckets": None,
    "data_parallel_address": None, "data_parallel_backend": "mp", "data_parallel_external_lb": False,
    "data_parallel_hybrid_lb": False, "data_parallel_multi_port_external_lb": False, "data_parallel_rank": None,
    "data_parallel_rpc_port": None, "data_parallel_size": 1, "data_parallel_size_local": None,
    "data_parallel_start_rank": None, "dbo_decode_token_threshold": 32, "dbo_prefill_token_threshold": 512,
    "dcp_comm_backend": None, "dcp_kv_cache_interleave_size": 1, "dcp_q_replicate": None,
    "decode_context_parallel_size": 1, "default_mm_loras": None, "device_ids": None, "diffusion_config": None,
    "disable_cascade_attn": None, "disable_chunked_mm_input": False, "disable_hybrid_kv_cache_manager": None,
    "disable_nccl_for_dp_synchronization": None, "disable_sliding_window": False,
    "distributed_timeout_seconds": None, "download_dir": None, "dp_sync_interval": 16, "ec_manager_config": None,
    "ec_transfer_config": None, "elastic_ep_max_dp_size": None, "enable_batch_sharded_sampling": None,
    "enable_cumem_allocator": False, "enable_dbo": False, "enable_elastic_ep": False,
    "enable_ep_weight_filter": False, "enable_eplb": False, "enable_expert_parallel": False,
    "enable_fault_tolerance": False, "enable_flashinfer_autotune": None, "enable_hc_sp": False,
    "enable_layerwise_nvtx_tracing": False, "enable_logging_iteration_details": False, "enable_lora": False,
    "enable_mamba_cache_stochastic_rounding": False, "enable_mamba_shared_prefix_checkpoint": False,
    "enable_mfu_metrics": False, "enable_mixed_moe_lora_format": False, "enable_mm_embeds": False,
    "enable_mm_processor_stats": False, "enable_moe_shared_loras": False, "enable_nccl_comm_suspend": False,
    "enable_prompt_embeds": False, "enable_shm_tensor_arena": False, "enable_tower_connector_lora": False,
    "enable_trace_replay": False, "engram_config": None, "eplb_config": None, "expert_placement_strategy": "linear",
    "fail_on_environ_validation": False, "fault_tolerance_config": None, "fully_sharded_loras": False,
    "gdn_prefill_backend": None, "hf_config_path": None, "ignore_patterns": None, "interleave_mm_strings": False,
    "io_processor_plugin": None, "ir_op_priority": None, "jit_monitor_mode": "warn", "jit_monitor_verbose": False,
    "kda_decode_backend": None, "kda_prefill_backend": None, "kernel_config": None, "kv_cache_dtype": "auto",
    "kv_cache_dtype_skip_layers": [], "kv_cache_metrics": False, "kv_cache_metrics_sample": 0.01,
    "kv_events_config": None, "kv_offloading_backend": "native", "kv_offloading_size": None,
    "kv_sharing_fast_prefill": False, "kv_transfer_config": None, "language_model_only": False,
    "linear_backend": "auto", "log_config_file": None, "log_level": None, "logging_config": None,
    "long_prefill_token_threshold": 0, "long_prefill_token_threshold_adaptive": False, "lora_dtype": "auto",
    "lora_target_modules": None, "mamba_backend": None, "mamba_block_size": None, "mamba_cache_dtype": "auto",
    "mamba_cache_mode": "none", "mamba_cache_philox_rounds": 0, "mamba_config": None,
    "mamba_ssm_cache_dtype": "auto", "mamba_ssu_algorithm": None, "master_addr": "127.0.0.1", "master_port": 29501,
    "max_cpu_loras": None, "max_cudagraph_capture_size": None, "max_logprobs": 20, "max_lora_cls_labels": None,
    "max_lora_rank": 16, "max_loras": 1, "max_num_active_seqs": None, "max_num_queued_reqs": None,
    "max_num_queued_tokens": None, "max_num_scheduled_tokens": None, "max_parallel_loading_workers": None,
    "media_io_kwargs": {}, "mm_device_do_normalize": True, "mm_encoder_attn_backend": None,
    "mm_encoder_attn_dtype": None, "mm_encoder_fp8_scale_path": None, "mm_encoder_fp8_scale_save_margin": 1.5,
    "mm_encoder_fp8_scale_save_path": None, "mm_encoder_only": False, "mm_encoder_tp_mode": "weights",
    "mm_hasher_algorithm": "blake3", "mm_ipc_gpu_memory_gb": 0, "mm_processor_cache_gb": 4,
    "mm_processor_cache_type": "lru", "mm_processor_device": "auto", "mm_shm_cache_max_object_size_mb": 128,
    "mm_tensor_ipc": "direct_rpc", "model_class_overrides": {}, "model_impl": "auto",
    "model_loader_extra_config": {}, "model_weights": "", "moe_backend": "auto", "nnodes": 1, "node_rank": 0,
    "num_gpu_blocks_override": None, "numa_bind": False, "numa_bind_cpus": None, "numa_bind_nodes": None,
    "offload_backend": "auto", "optimization_level": None, "otlp_traces_endpoint": None,
    "per_request_spec_decode_metrics": "none", "performance_mode": "balanced", "pipeline_parallel_size": 1,
    "prefill_context_parallel_size": 1, "prefill_schedule_interval": 1, "prefix_cache_retention_interval": 0,
    "prefix_caching_hash_algo": "sha256", "prefix_match_unit": None, "pt_load_map_location": "cpu",
    "ray_workers_use_nsight": False, "reasoning_config": None, "reasoning_parser": "",
    "reasoning_parser_plugin": None, "renderer_num_workers": 1, "replayssm_buffer_len": 16,
    "safetensors_load_strategy": None, "safetensors_prefetch_block_size": 16777216,
    "safetensors_prefetch_num_threads": 8, "scheduler_cls": None, "scheduler_reserve_full_isl": True,
    "scheduling_policy": "fcfs", "served_model_name": None, "show_hidden_metrics_for_version": None,
    "shutdown_timeout": 0, "skip_mm_profiling": False, "sleep_mode_offload_cudagraph": False,
    "sleep_preserve_parameter_names": [], "sparse_indexer_topk_backend": "auto", "specialize_active_lora": False,
    "speculative_config": None, "stream_interval": 1, "swa_bounded_replay": True, "tokens_only": False,
    "ubatch_size": 0, "use_fp64_gumbel": False, "use_replayssm": False, "use_tqdm_on_load": True,
    "video_pruning_method": "evs", "video_pruning_rate": None, "watermark": 0.0, "watermark_config": None,
    "weight_transfer_config": None, "worker_cls": "auto",
}  # fmt: skip
"""The other arguments of ``EngineArgs``, none of which there is but with these values, its defaults.

``None`` stands for those that are objects of vLLM.
"""

_DEFAULTS = {**_NAMED, **_MORE, **_LACKING}
"""Of ``LLM``."""

_ENGINE_ARGS = {
    "model": "Qwen/Qwen3-0.6B",
    **{name: value for name, value in _DEFAULTS.items() if name != "chat_template"},
    "disable_log_stats": False,
    "hf_overrides": {},
    "offload_params": set(),
    "override_generation_config": {},
}
"""Of ``EngineArgs``."""


def _field(value: Any) -> Any:
    return field(default_factory=type(value)) if isinstance(value, (dict, list, set)) else field(default=value)


EngineArgs = dataclasses.make_dataclass(
    "EngineArgs",
    [(name, Any, _field(_ENGINE_ARGS[name])) for name in _ENGINE_ARGS],
    bases=(Refusing,),
    namespace={"_engine": "vLLM"},
)
EngineArgs.__module__ = "vllm.engine.arg_utils"


def read(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``LLM`` but for its model, defaults filled in.

    Raises:
        ConfigError: one is lacking, or has a value that is.
        TypeError: vLLM has no such argument either.
        ValueError: vLLM refuses a value too.
    """
    unknown = sorted(set(given) - set(_DEFAULTS))
    if unknown:
        raise TypeError(f"LLM got an unexpected keyword argument {unknown[0]!r}, which vLLM does not know")
    ARGUMENTS.check(given, _DEFAULTS)
    found = {**_DEFAULTS, **given}
    for name, fits, wanted in _rules(found):
        if not fits:
            raise ValueError(f"{name}={found[name]!r}: expected {wanted}")
    return found


def _rules(given: Mapping[str, Any]) -> Iterator[tuple[str, bool, str]]:
    most = given["max_model_len"]
    counts = isinstance(most, int) and (most >= 1 or most == -1)
    yield "max_model_len", most is None or counts, "a number of tokens, or -1 for what fits"
    yield "gpu_memory_utilization", 0 < given["gpu_memory_utilization"] <= 1, "above 0, at most 1"
    yield "seed", isinstance(given["seed"], int), "an integer"
    yield "tensor_parallel_size", given["tensor_parallel_size"] >= 1, "1 or more"
    for name in ("max_num_batched_tokens", "max_num_seqs"):
        yield name, given[name] is None or given[name] >= 1, "1 or more"


def length(asked: int | None, most: int | None) -> int:
    """Most tokens of a prompt and its completion.

    Args:
        asked: ``max_model_len``; ``None`` and -1 leave it to the model.
        most: that the model was made for, if it is known.

    Raises:
        ValueError: the model was made for fewer, and ``VLLM_ALLOW_LONG_MAX_MODEL_LEN`` is not set.
    """
    if asked is None or asked == -1:
        return most or _LENGTH
    allowed = os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "").strip().lower() in ("1", "true")
    if most is not None and asked > most and not allowed:
        raise ValueError(
            f"max_model_len ({asked}) is greater than the derived max_model_len (max_position_embeddings={most} in the "
            "model's config.json): lower it, or set the environment variable VLLM_ALLOW_LONG_MAX_MODEL_LEN=1"
        )
    return asked


signature = inspect.Signature(
    [
        inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD),
        *(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in _NAMED.items()),
        inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD),
    ]
)
"""Of ``LLM``."""
