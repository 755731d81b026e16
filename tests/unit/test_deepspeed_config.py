"""What DeepSpeed is told, by the settings of a strategy."""

import pytest

from lightrft.errors import ConfigError
from lightrft.strategy import StrategyConfig
from lightrft.strategy.deepspeed.deepspeed_utils import (
    ModelSize,
    evaluation_config,
    evaluation_stage,
    training_config,
    training_stage,
)

SIZE = ModelSize(elements=1000, width=16)


def training(*, shard_size=-1, world_size=4, accumulation=1, **settings):
    config = StrategyConfig(**settings)
    return training_config(config, SIZE, shard_size=shard_size, world_size=world_size, accumulation=accumulation)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_is_that_of_the_config(stage):
    assert training(zero_stage=stage)["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize(("max_norm", "told"), [(0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_k03_clipping_is_always_told_since_deepspeed_clips_at_1_otherwise(max_norm, told):
    assert training(max_norm=max_norm)["gradient_clipping"] == told


def test_accumulation_is_told():
    assert training(accumulation=5)["gradient_accumulation_steps"] == 5


def test_precision_is_told():
    assert "bf16" not in training()
    assert "fp16" not in training()
    assert training(bf16=True)["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert training(fp16=True)["fp16"] == {"enabled": True}


def test_k24_each_flag_of_deepspeed_is_told():
    assert training(overlap_comm=True)["zero_optimization"]["overlap_comm"] is True
    assert training()["zero_optimization"]["overlap_comm"] is False
    assert training(adam_offload=True)["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert "offload_optimizer" not in training()["zero_optimization"]
    assert training(zero_stage=3, zpg=2)["zero_optimization"]["zero_hpz_partition_size"] == 2
    assert training(grad_accum_dtype="fp32")["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "data_types" not in training()


def test_buckets_are_no_larger_than_the_model():
    small = training(zero_stage=3)["zero_optimization"]
    assert small["reduce_bucket_size"] == 1000
    assert small["stage3_param_persistence_threshold"] == 160
    large = training_config(
        StrategyConfig(zero_stage=3),
        ModelSize(elements=10**11, width=10**5),
        shard_size=-1,
        world_size=4,
        accumulation=1,
    )["zero_optimization"]
    assert large["reduce_bucket_size"] == 500_000_000
    assert large["stage3_param_persistence_threshold"] == 100_000


def test_weights_stay_gathered_only_if_that_is_asked_for():
    kept = training_config(
        StrategyConfig(zero_stage=3), SIZE, shard_size=-1, world_size=4, accumulation=1, reshard_after_forward=False
    )["zero_optimization"]
    assert kept["stage3_max_reuse_distance"] > 10**12
    assert "stage3_max_reuse_distance" not in training(zero_stage=3)["zero_optimization"]


def test_stage_1_in_bf16_with_fp32_gradients_runs_at_stage_2():
    both = {"zero_stage": 1, "bf16": True, "grad_accum_dtype": "fp32"}
    assert training_stage(StrategyConfig(**both)) == 2
    assert training_stage(StrategyConfig(**both, adam_offload=True)) == 1
    assert training_stage(StrategyConfig(zero_stage=1, bf16=True)) == 1
    assert training_stage(StrategyConfig(zero_stage=3, bf16=True, grad_accum_dtype="fp32")) == 3


@pytest.mark.parametrize(
    ("stage", "shard_size", "expected"),
    [(1, -1, 0), (1, 2, 3), (2, 4, 3), (2, 1, 0), (3, -1, 3), (3, 4, 3), (3, 2, 3), (3, 1, 0)],
)
def test_frozen_models_are_spread_at_stage_3_or_if_ranks_shall_share_them(stage, shard_size, expected):
    assert evaluation_stage(StrategyConfig(zero_stage=stage), shard_size) == expected


def test_k19_a_model_that_is_trained_is_spread_over_all_ranks():
    with pytest.raises(ConfigError, match="use -1 or 4, or FSDP"):
        training(shard_size=2)


def test_precision_of_whole_frozen_models_is_not_deepspeeds_business():
    config = StrategyConfig(zero_stage=3, bf16=True)
    assert "bf16" not in evaluation_config(config, SIZE, stage=0)
    assert evaluation_config(config, SIZE, stage=3)["bf16"]["enabled"] is True
