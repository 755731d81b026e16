"""The contract of strategies, and what an implementation of it may lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightrft.sim.contracts.contract import Contract

__all__ = ["LACKS", "SETTINGS", "contract"]

contract = Contract(
    "strategy",
    prefix="ST",
    capabilities={
        "moves_model": "offload_model and reload_model move the weights",
        "moves_optimizer": "maybe_offload_optimizer and maybe_load_optimizer move the states of the optimizer",
        "skips_nan": "a step whose gradient norm is not finite leaves the weights alone",
        "other_sizes": "a checkpoint loads at another number of ranks",
        "shards_partly": "shard_size may be more than one rank and less than all",
        "bf16": "training in bfloat16",
        "fp16": "training in float16 with loss scaling",
        "sequence_parallel": "sp_size above 1",
    },
)

SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "fake, as FSDP": {"strategy": "fake", "fsdp": True},
    "fake, as DeepSpeed": {"strategy": "fake"},
    "FSDP": {"fsdp": True},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
}
"""The strategies of this package, by the settings that choose them."""

LACKS: Mapping[str, Mapping[str, str]] = {name: {} for name in SETTINGS}
"""What each of them lacks, with the reason."""
