"""Which settings contradict each other, and which do not fit the number of ranks.

Every function gives sentences, one for each problem, that say what was got, what was expected and what to change; none
if all is well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightrft.strategy.setting import any_of

if TYPE_CHECKING:
    from lightrft.strategy.config import StrategyConfig

__all__ = ["batch_problems", "contradictions", "divisor_problem", "without_effect", "world_problems"]


def contradictions(config: StrategyConfig) -> Iterator[str]:
    """Settings that cannot hold together, in any world.

    ``zero_stage`` and ``overlap_comm`` may stand beside ``fsdp``: the first waits until ``fsdp`` is switched off again,
    and FSDP always overlaps.
    """
    if config.bf16 and config.fp16:
        yield "bf16 and fp16 are both on: a model trains in one of them; switch one off"
    if config.fsdp and config.strategy == "deepspeed":
        yield "strategy='deepspeed' and fsdp are both given: leave one of them out"
    yield from _other_backend(config)
    micro = config.micro_train_batch_size
    if config.train_batch_size % micro:
        yield (
            f"train_batch_size={config.train_batch_size} is no multiple of micro_train_batch_size={micro}: use "
            f"train_batch_size={_multiples(config.train_batch_size, micro)}"
        )


def without_effect(config: StrategyConfig) -> Iterator[str]:
    """Settings that change nothing as things are, and do no harm: a strategy warns of them.

    ``use_mp_opt`` is no contradiction in float32, so that the precision can be switched by one flag.
    """
    if config.use_mp_opt and not (config.bf16 or config.fp16):
        yield "use_mp_opt changes nothing in float32, which needs no masters: switch bf16 or fp16 on, or leave it out"
    if config.engine_sleep_level == 2 and not config.enable_engine_sleep:
        yield "engine_sleep_level=2 changes nothing with enable_engine_sleep off: switch it on, or leave the level out"


def _other_backend(config: StrategyConfig) -> Iterator[str]:
    """Settings that would change nothing, because only the other backend knows them."""
    if not config.fsdp:
        if config.fsdp_cpu_offload:
            yield "fsdp_cpu_offload needs fsdp: switch fsdp on, or use adam_offload, which is the same for DeepSpeed"
        if config.use_mp_opt:
            yield "use_mp_opt needs fsdp: switch fsdp on, or leave it out (DeepSpeed always keeps fp32 masters)"
        if config.zpg > 1 and config.zero_stage != 3:
            yield f"zpg={config.zpg} needs zero_stage=3, got zero_stage={config.zero_stage}: set it to 3, or zpg to 1"
        return
    if config.adam_offload:
        yield "adam_offload is for DeepSpeed, and fsdp is on: use fsdp_cpu_offload, which is the same for FSDP"
    if config.grad_accum_dtype is not None:
        yield f"grad_accum_dtype={config.grad_accum_dtype!r} is for DeepSpeed, and fsdp is on: leave it out"
    if config.zpg > 1:
        yield f"zpg={config.zpg} is for DeepSpeed, and fsdp is on: set it to 1, or switch fsdp off"


def world_problems(config: StrategyConfig, world_size: int) -> Iterator[str]:
    """What a world of ``world_size`` ranks does not divide."""
    yield from divisor_problem(config, "engine_tp_size", world_size)
    yield from divisor_problem(config, "zpg", world_size)
    yield from batch_problems(config, world_size)


def divisor_problem(config: StrategyConfig, name: str, world_size: int) -> Iterator[str]:
    """Groups of consecutive ranks: their size has to divide ``world_size``."""
    size: int = getattr(config, name)
    if world_size % size:
        divisors = [each for each in range(1, world_size + 1) if world_size % each == 0]
        nearest = [*[each for each in divisors if each < size][-1:], *[each for each in divisors if each > size][:1]]
        yield (
            f"{name}={size} does not divide a world of {world_size} ranks: use {name}={any_of(nearest)}, or run "
            f"{_multiples(world_size, size)} ranks"
        )


def batch_problems(config: StrategyConfig, world_size: int) -> Iterator[str]:
    """Every data parallel rank takes the same number of micro-batches between two optimizer steps."""
    unfit = list(divisor_problem(config, "sp_size", world_size))
    if unfit:
        yield from unfit
        return
    ranks = world_size // config.sp_size
    step = config.micro_train_batch_size * ranks
    if config.train_batch_size % step:
        sharing = f" ({world_size} ranks, sp_size={config.sp_size})" if config.sp_size > 1 else ""
        yield (
            f"train_batch_size={config.train_batch_size} is no multiple of micro_train_batch_size="
            f"{config.micro_train_batch_size} x {ranks} data parallel ranks{sharing} = {step}: use train_batch_size="
            f"{_multiples(config.train_batch_size, step)}"
        )


def _multiples(value: int, step: int) -> str:
    """The multiples of ``step`` on both sides of ``value``, which is none."""
    below = value - value % step
    return any_of([below, below + step] if below else [step])
