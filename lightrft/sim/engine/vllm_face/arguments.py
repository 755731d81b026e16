"""Arguments of ``vllm.LLM`` and ``vllm.EngineArgs``, and what the fake engine makes of them."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any

from lightrft.errors import ConfigError
from lightrft.sim.engine.lacking import CODE, MEMORY, ORDER, SPEED, Surface, lacks

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

_DEFAULTS = {**_NAMED, **_MORE}

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

_LACKING = """
_api_process_count _api_process_rank additional_config aggregate_engine_logging all2all_backend
allow_deprecated_quantization attention_backend aux_output_config code_revision collect_detailed_traces config_format
cp_kv_cache_interleave_size cpu_distributed_timeout_seconds cpu_offload_params cudagraph_capture_sizes
cudagraph_metrics custom_histogram_buckets data_parallel_address data_parallel_backend data_parallel_external_lb
data_parallel_hybrid_lb data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port
data_parallel_size data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold
dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate decode_context_parallel_size
default_mm_loras device_ids diffusion_config disable_cascade_attn disable_chunked_mm_input
disable_hybrid_kv_cache_manager disable_nccl_for_dp_synchronization disable_sliding_window distributed_timeout_seconds
download_dir dp_sync_interval ec_manager_config ec_transfer_config elastic_ep_max_dp_size
enable_batch_sharded_sampling enable_cumem_allocator enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb
enable_expert_parallel enable_fault_tolerance enable_flashinfer_autotune enable_hc_sp enable_layerwise_nvtx_tracing
enable_logging_iteration_details enable_lora enable_mamba_cache_stochastic_rounding
enable_mamba_shared_prefix_checkpoint enable_mfu_metrics enable_mixed_moe_lora_format enable_mm_embeds
enable_mm_processor_stats enable_moe_shared_loras enable_nccl_comm_suspend enable_prompt_embeds
enable_shm_tensor_arena enable_tower_connector_lora enable_trace_replay engram_config eplb_config
expert_placement_strategy fail_on_environ_validation fault_tolerance_config fully_sharded_loras gdn_prefill_backend
hf_config_path ignore_patterns interleave_mm_strings io_processor_plugin ir_op_priority jit_monitor_mode
jit_monitor_verbose kda_decode_backend kda_prefill_backend kernel_config kv_cache_dtype kv_cache_dtype_skip_layers
kv_cache_metrics kv_cache_metrics_sample kv_events_config kv_offloading_backend kv_offloading_size
kv_sharing_fast_prefill kv_transfer_config language_model_only linear_backend log_config_file log_level logging_config
long_prefill_token_threshold long_prefill_token_threshold_adaptive lora_dtype lora_target_modules mamba_backend
mamba_block_size mamba_cache_dtype mamba_cache_mode mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype
mamba_ssu_algorithm master_addr master_port max_cpu_loras max_cudagraph_capture_size max_logprobs max_lora_cls_labels
max_lora_rank max_loras max_num_active_seqs max_num_queued_reqs max_num_queued_tokens max_num_scheduled_tokens
max_parallel_loading_workers media_io_kwargs mm_device_do_normalize mm_encoder_attn_backend mm_encoder_attn_dtype
mm_encoder_fp8_scale_path mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path mm_encoder_only
mm_encoder_tp_mode mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb mm_processor_cache_type
mm_processor_device mm_shm_cache_max_object_size_mb mm_tensor_ipc model_class_overrides model_impl
model_loader_extra_config model_weights moe_backend nnodes node_rank num_gpu_blocks_override numa_bind numa_bind_cpus
numa_bind_nodes offload_backend optimization_level otlp_traces_endpoint per_request_spec_decode_metrics
performance_mode pipeline_parallel_size prefill_context_parallel_size prefill_schedule_interval
prefix_cache_retention_interval prefix_caching_hash_algo prefix_match_unit pt_load_map_location ray_workers_use_nsight
reasoning_config reasoning_parser reasoning_parser_plugin renderer_num_workers replayssm_buffer_len
safetensors_load_strategy safetensors_prefetch_block_size safetensors_prefetch_num_threads scheduler_cls
scheduler_reserve_full_isl scheduling_policy served_model_name show_hidden_metrics_for_version shutdown_timeout
skip_mm_profiling sleep_mode_offload_cudagraph sleep_preserve_parameter_names sparse_indexer_topk_backend
specialize_active_lora speculative_config stream_interval swa_bounded_replay tokens_only ubatch_size use_fp64_gumbel
use_replayssm use_tqdm_on_load video_pruning_method video_pruning_rate watermark watermark_config
weight_transfer_config worker_cls
"""
"""The other arguments of ``EngineArgs``, none of which there is."""

EngineArgs = dataclasses.make_dataclass(
    "EngineArgs",
    [
        ("model", str),
        *((name, Any, field(default=value)) for name, value in _DEFAULTS.items() if name != "chat_template"),
    ],
)
EngineArgs.__module__ = "vllm.engine.arg_utils"


def read(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``LLM`` but for its model, defaults filled in.

    Raises:
        ConfigError: one is lacking, or has a value that is.
        TypeError: vLLM has no such argument either.
        ValueError: vLLM refuses a value too.
    """
    unknown = sorted(set(given) - set(_DEFAULTS) - set(_LACKING.split()))
    if unknown:
        raise TypeError(f"LLM got an unexpected keyword argument {unknown[0]!r}, which vLLM does not know")
    if lacking := sorted(set(given) & set(_LACKING.split())):
        raise ConfigError(lacks("vLLM", ", ".join(lacking)))
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
