"""What DeepSpeed is told: its configuration, made of that of a strategy. Nothing here needs deepspeed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError

if TYPE_CHECKING:
    from lightrft.strategy.config import StrategyConfig

__all__ = [
    "ModelSize",
    "check_training_shards",
    "evaluation_config",
    "evaluation_stage",
    "training_config",
    "training_stage",
]

_LARGEST_BUCKET = 500_000_000
_LARGEST_PERSISTENT = 100_000
_UNLIMITED = 2**62


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What buffers are measured by.

    Attributes:
        elements: of all parameters together.
        width: of the longest one-dimensional parameter, 0 if there is none.
    """

    elements: int
    width: int


def training_config(
    config: StrategyConfig,
    size: ModelSize,
    *,
    shard_size: int,
    world_size: int,
    accumulation: int,
    pin_memory: bool = False,
    reshard_after_forward: bool = True,
) -> dict[str, Any]:
    """DeepSpeed's configuration for a model that is trained.

    Args:
        config: of the strategy.
        size: of the model. Buckets are no larger than the model, and at stage 3 parameters of up to ten times the
            model's width stay whole.
        shard_size: as in ``prepare_model``.
        world_size: ranks that share what is spread: all, whatever ``sp_size`` is.
        accumulation: micro-batches of one optimizer step.
        pin_memory: page-lock what ``adam_offload`` keeps on the CPU.
        reshard_after_forward: at stage 3, free gathered weights after the forward pass.

    Raises:
        ConfigError: ``shard_size`` is not that of all ranks.
    """
    check_training_shards(shard_size, world_size)
    zero = _zero(training_stage(config), size, reshard_after_forward=reshard_after_forward)
    zero["overlap_comm"] = config.overlap_comm
    zero["reduce_bucket_size"] = _bucket(size)
    if config.adam_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    if config.zpg != 1:
        zero["zero_hpz_partition_size"] = config.zpg
    settings = (
        _common(config, zero)
        | _precision(config)
        | {
            "gradient_accumulation_steps": accumulation,
            "gradient_clipping": float(config.max_norm),  # DeepSpeed clips at 1 if nothing is said
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    )
    if config.grad_accum_dtype is not None:
        settings["data_types"] = {"grad_accum_dtype": config.grad_accum_dtype}
    return settings


def check_training_shards(shard_size: int, world_size: int) -> None:
    """DeepSpeed spreads a model that is trained over all ranks.

    Raises:
        ConfigError: ``shard_size`` is not that of all ranks.
    """
    if shard_size not in (-1, world_size):
        raise ConfigError(
            f"shard_size is {shard_size} in a world of {world_size}, for a model that is trained: DeepSpeed spreads it "
            f"over all ranks: use -1 or {world_size}, or FSDP (--fsdp), which can do that"
        )


def training_stage(config: StrategyConfig) -> int:
    """ZeRO stage of a model that is trained: that of the config, with one exception.

    For stage 1 in bf16 with gradients accumulated in fp32 DeepSpeed has an optimizer of its own, which ends the run
    when a gradient is zero or not finite. Stage 2 computes the same, and skips such a step.
    """
    own = config.bf16 and config.grad_accum_dtype == "fp32" and not config.adam_offload
    return 2 if config.zero_stage == 1 and own else config.zero_stage


def evaluation_stage(config: StrategyConfig, shard_size: int) -> int:
    """ZeRO stage of a model that is only evaluated: 3 if its weights are spread, else 0.

    Args:
        config: of the strategy; below stage 3 each rank keeps all weights, unless ``shard_size`` says otherwise.
        shard_size: as in ``prepare_model``.
    """
    if shard_size == -1:
        return 3 if config.zero_stage == 3 else 0
    return 0 if shard_size == 1 else 3


def evaluation_config(
    config: StrategyConfig, size: ModelSize, *, stage: int, reshard_after_forward: bool = True
) -> dict[str, Any]:
    """DeepSpeed's configuration for a model that is only evaluated.

    Args:
        config: of the strategy.
        size: of the model.
        stage: 0 or 3; DeepSpeed wants an optimizer for the others. At stage 0 it says nothing of the precision, since
            DeepSpeed would make an optimizer for it: the weights are cast before.
        reshard_after_forward: at stage 3, free gathered weights after use.
    """
    zero = _zero(stage, size, reshard_after_forward=reshard_after_forward)
    if stage == 3 and config.zpg != 1:
        zero["zero_hpz_partition_size"] = config.zpg
    return _common(config, zero) | (_precision(config) if stage == 3 else {})


def _common(config: StrategyConfig, zero: dict[str, Any]) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": config.micro_train_batch_size,
        "steps_per_print": None,
        "zero_optimization": zero,
    }


def _precision(config: StrategyConfig) -> dict[str, Any]:
    if config.bf16:  # a norm that is not finite skips the step, as it does in fp16 and fp32
        return {"bf16": {"enabled": True, "check_grad_overflow": True}}
    return {"fp16": {"enabled": True}} if config.fp16 else {}


def _zero(stage: int, size: ModelSize, *, reshard_after_forward: bool) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = _bucket(size) // 10
        zero["stage3_param_persistence_threshold"] = min(10 * size.width, _LARGEST_PERSISTENT)
        if not reshard_after_forward:
            zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = _UNLIMITED
    return zero


def _bucket(size: ModelSize) -> int:
    return max(1, min(size.elements, _LARGEST_BUCKET))
