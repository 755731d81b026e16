"""``StrategyConfig``: every setting of a strategy, checked when it is built.

Each field carries its group, help text and allowed values (``lightrft.strategy.setting``); the flags of the command
line are derived from them (``lightrft.strategy.arguments``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightrft.errors import ConfigError
from lightrft.strategy import consistency
from lightrft.strategy.configuration import Configuration
from lightrft.strategy.setting import setting
from lightrft.strategy.utils.schedulers import SCHEDULES

__all__ = ["StrategyConfig"]

_TRAINING = "Training"
_DISTRIBUTED = "Distributed training"
_OPTIMIZATION = "Training optimization"
_ENGINE = "Inference engine"
_ROLLOUT = "Rollouts"
_MONITORING = "Monitoring"
_DTYPES = ("fp32", "bf16", "fp16")
_NO_STAGE = {0: "stage 0 shards nothing; stage 1 trains the same and needs less memory"}
_DEFAULT_LOG_DIR = "./logs"


@dataclass(frozen=True, kw_only=True, repr=False)
class StrategyConfig(Configuration):
    """Every setting of a strategy. It cannot be changed once built: ``replace`` makes another one.

    Two settings follow from others: ``strategy="fsdp"`` sets ``fsdp``, and ``plot_every`` without ``log_dir`` sets
    ``log_dir`` to ``"./logs"``.

    Raises:
        ConfigError: if a value has another type or is not allowed, or two settings contradict each other. The message
            names all that is wrong, one problem a line.
    """

    seed: int = setting(42, _TRAINING, "seed of all random numbers", at_least=0, below=2**32)
    bf16: bool = setting(False, _TRAINING, "train in bfloat16")
    fp16: bool = setting(False, _TRAINING, "train in float16, with loss scaling")
    max_norm: float = setting(1.0, _TRAINING, "largest global norm of the gradient; 0: no clipping", at_least=0)
    train_batch_size: int = setting(128, _TRAINING, "samples of one optimizer step, over all ranks", at_least=1)
    micro_train_batch_size: int = setting(1, _TRAINING, "samples of one backward pass on one rank", at_least=1)
    actor_learning_rate: float = setting(1e-6, _TRAINING, "learning rate of the actor", at_least=0)
    critic_learning_rate: float = setting(9e-6, _TRAINING, "learning rate of the critic", at_least=0)
    adam_betas: tuple[float, float] = setting((0.9, 0.95), _TRAINING, "the two betas of Adam", at_least=0, below=1)
    weight_decay: float = setting(0.0, _TRAINING, "weight decay, not of biases and norms", at_least=0)
    lr_scheduler: str = setting(
        "cosine_with_min_lr",
        _TRAINING,
        "how learning rates change after the warm-up; linear falls to 0, cosine_with_min_lr to a tenth of the peak",
        choices=tuple(SCHEDULES),
    )
    lr_warmup_ratio: float = setting(
        0.03, _TRAINING, "share of the steps in which learning rates rise to their peak", at_least=0, at_most=1
    )
    gradient_checkpointing: bool = setting(False, _TRAINING, "recompute activations in the backward pass")
    pretrain: str | None = setting(None, _TRAINING, "path or name of the model to start from")

    fsdp: bool = setting(False, _DISTRIBUTED, "use FSDP instead of DeepSpeed")
    zero_stage: int = setting(2, _DISTRIBUTED, "ZeRO stage of DeepSpeed", choices=(1, 2, 3), refused=_NO_STAGE)
    fsdp_cpu_offload: bool = setting(False, _DISTRIBUTED, "keep FSDP's optimizer states on the CPU")
    adam_offload: bool = setting(False, _DISTRIBUTED, "keep DeepSpeed's Adam states on the CPU")
    zpg: int = setting(
        1, _DISTRIBUTED, "ZeRO-3 keeps a second copy of the parameters within groups of N ranks; 1: none", at_least=1
    )
    overlap_comm: bool = setting(False, _DISTRIBUTED, "overlap DeepSpeed's communication with the backward pass")
    grad_accum_dtype: str | None = setting(
        None, _DISTRIBUTED, "dtype in which gradients are accumulated; by default the backend's own", choices=_DTYPES
    )
    sp_size: int = setting(1, _DISTRIBUTED, "ranks that share one sequence (sequence parallelism)", at_least=1)
    strategy: str | None = setting(
        None, _DISTRIBUTED, "strategy by name: deepspeed, fsdp, fake or a registered one; by default as --fsdp says"
    )
    local_rank: int = setting(
        -1, _DISTRIBUTED, "rank within the node, where the environment does not say it; -1: not given", at_least=-1
    )

    packing_samples: bool = setting(False, _OPTIMIZATION, "pack several samples into one sequence")
    use_mp_opt: bool = setting(False, _OPTIMIZATION, "low-precision parameters, fp32 masters in the optimizer (FSDP)")
    fused_linear_logprob: bool = setting(False, _OPTIMIZATION, "compute output layer and log-probs together, in chunks")
    chunk_size: int = setting(
        4096, _OPTIMIZATION, "vocabulary entries that a fused operation computes at a time", at_least=1
    )
    mixed_mm_data: bool = setting(False, _OPTIMIZATION, "samples with and without images or videos in one batch")

    engine_type: str = setting("vllm", _ENGINE, "engine that generates", choices=("vllm", "sglang"))
    engine_tp_size: int = setting(1, _ENGINE, "ranks that share one engine (tensor parallelism)", at_least=1)
    engine_mem_util: float = setting(0.85, _ENGINE, "share of GPU memory that the engine may use", above=0, at_most=1)
    enable_engine_sleep: bool = setting(
        True, _ENGINE, "let the engine sleep while the model trains", off_flag="disable_engine_sleep"
    )
    engine_sleep_level: int = setting(
        1,
        _ENGINE,
        "what an engine does with its weights when it sleeps; 1: keeps them in host memory, 2: drops them, and gets "
        "them again",
        choices=(1, 2),
    )
    engine_update_bucket_mb: int = setting(512, _ENGINE, "MiB of weights sent to the engine at once", at_least=1)

    rollout_batch_size: int = setting(1024, _ROLLOUT, "prompts of one iteration, over all ranks", at_least=1)
    micro_rollout_batch_size: int = setting(8, _ROLLOUT, "samples of one forward pass on one rank", at_least=1)
    prompt_max_len: int = setting(1024, _ROLLOUT, "largest number of tokens of a prompt", at_least=1)
    generate_max_len: int = setting(1024, _ROLLOUT, "largest number of tokens that are generated", at_least=1)

    log_dir: str | None = setting(
        None,
        _MONITORING,
        f"folder for logs and plots; without it nothing is logged, and plots go to {_DEFAULT_LOG_DIR}",
    )
    plot_every: int = setting(
        0,
        _MONITORING,
        "plot the distribution of generated lengths every N steps; 0: never",
        at_least=0,
    )

    extra_args: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Entries that are no settings, read-only; ``get_extra_arg`` reads one."""

    def data_parallel_size(self, world_size: int) -> int:
        """Ranks that see different data: ``world_size // sp_size``.

        Raises:
            ConfigError: if ``sp_size`` does not divide ``world_size``.
        """
        _raise_all(consistency.divisor_problem(self, "sp_size", _checked_world(world_size)))
        return world_size // self.sp_size

    def accumulated_gradient(self, world_size: int) -> int:
        """Micro-batches of one rank between two optimizer steps.

        ``train_batch_size // (micro_train_batch_size * data_parallel_size(world_size))``, without a remainder.

        Raises:
            ConfigError: if the ranks cannot share ``train_batch_size`` equally.
        """
        _raise_all(consistency.batch_problems(self, _checked_world(world_size)))
        return self.train_batch_size // (self.micro_train_batch_size * self.data_parallel_size(world_size))

    def check_world(self, world_size: int) -> None:
        """Check that ``engine_tp_size``, ``sp_size``, ``zpg`` and the training batch sizes fit ``world_size`` ranks.

        Raises:
            ConfigError: if one does not; the message names all that do not, and the nearest values that would.
        """
        _raise_all(consistency.world_problems(self, _checked_world(world_size)))

    def _follow(self) -> None:
        if self.strategy == "fsdp":
            object.__setattr__(self, "fsdp", True)
        if self.plot_every and self.log_dir is None:
            object.__setattr__(self, "log_dir", _DEFAULT_LOG_DIR)

    def _contradictions(self) -> Iterator[str]:
        return consistency.contradictions(self)


def _checked_world(world_size: Any) -> int:
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ConfigError(f"world_size={world_size!r}: expected the number of ranks, at least 1")
    return world_size


def _raise_all(problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        raise ConfigError("\n".join(found))
