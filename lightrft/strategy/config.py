"""``StrategyConfig``: every setting of a strategy, checked when it is built.

Each field carries its group, help text and allowed values (``lightrft.strategy.setting``); the flags of the command
line are derived from them (``lightrft.strategy.arguments``).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from lightrft.errors import ConfigError
from lightrft.strategy import consistency
from lightrft.strategy.setting import Setting, any_of, setting, settings_of
from lightrft.strategy.sources import ReadOnlyMapping, entries
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
class StrategyConfig:
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

    def __post_init__(self) -> None:
        problems = list(self._take_checked())
        if not problems:
            self._follow()
            problems = list(consistency.contradictions(self))
        if problems:
            raise ConfigError("\n".join(problems))

    @classmethod
    def from_args(cls, source: Any = None, **overrides: Any) -> Self:
        """The configuration that ``source`` describes.

        ``None`` for a setting that cannot be ``None`` means that it was not given. Entries that are no settings go to
        ``extra_args``. A setting's off-flag (``disable_engine_sleep``) is understood as on the command line.

        Args:
            source: parsed arguments, a mapping, an object with attributes, another configuration, or ``None``.
            overrides: settings, or extra entries of ``source``, that win over what ``source`` says.

        Raises:
            ConfigError: if ``source`` cannot be read, an override is unknown, or the configuration cannot be built.
        """
        given = cls._given(source.to_dict() if isinstance(source, StrategyConfig) else entries(source, cls._names()))
        extra = given["extra_args"]
        changed = cls._given(overrides)
        unknown = [name for name in overrides if name in changed["extra_args"] and name not in extra]
        if unknown:
            raise ConfigError(cls._unknown(unknown[0]))
        return cls(**{**given, **changed, "extra_args": {**extra, **changed["extra_args"]}})

    def replace(self, **changes: Any) -> Self:
        """Another configuration with ``changes``, checked as a new one.

        Raises:
            ConfigError: if a name is unknown, or the configuration cannot be built.
        """
        for name in changes:
            if name not in self._names():
                raise ConfigError(self._unknown(name))
        return type(self)(**{**{name: getattr(self, name) for name in self._names()}, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Every field by name, ``extra_args`` as a dict of its own; ``from_args`` reads it back."""
        return {name: getattr(self, name) for name in self._names()} | {"extra_args": dict(self.extra_args)}

    def get_extra_arg(self, name: str, default: Any = None) -> Any:
        """The entry ``name`` that is no setting, else ``default``; the name of a setting gives that setting."""
        return getattr(self, name) if name in settings_of(self) else self.extra_args.get(name, default)

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

    def summary(self) -> str:
        """What differs from the defaults, one setting a line, and the names of the extra entries."""
        lines = [f"  {name} = {value!r} (default: {known.default!r})" for name, value, known in self._changed()]
        if self.extra_args:
            lines.append(f"  extra_args: {', '.join(self.extra_args)}")
        name = type(self).__name__
        return "\n".join([f"{name}, what differs from the defaults:", *lines]) if lines else f"{name}: all defaults"

    def __repr__(self) -> str:
        words = [f"{name}={value!r}" for name, value, _ in self._changed()]
        if self.extra_args:
            words.append(f"extra_args=<{', '.join(self.extra_args)}>")
        return f"{type(self).__name__}({', '.join(words)})"

    def _changed(self) -> list[tuple[str, Any, Setting]]:
        known = [(name, getattr(self, name), each) for name, each in settings_of(self).items()]
        return [(name, value, each) for name, value, each in known if value != each.default]

    def _take_checked(self) -> Iterator[str]:
        """Put checked values in place of the given ones; what is wrong with those that cannot be taken."""
        for name, known in settings_of(self).items():
            try:
                object.__setattr__(self, name, known.checked(name, getattr(self, name)))
            except ConfigError as error:
                yield str(error)
        try:
            object.__setattr__(self, "extra_args", ReadOnlyMapping(entries(self.extra_args, ())))
        except ConfigError as error:
            yield f"extra_args: {error}"
            return
        for name in self.extra_args:
            if name in self._names():
                yield f"extra_args has {name!r}, which is a setting: give it as {name}=..."

    def _follow(self) -> None:
        if self.strategy == "fsdp":
            object.__setattr__(self, "fsdp", True)
        if self.plot_every and self.log_dir is None:
            object.__setattr__(self, "log_dir", _DEFAULT_LOG_DIR)

    @classmethod
    def _names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls) if field.init]

    @classmethod
    def _given(cls, found: Mapping[str, Any]) -> dict[str, Any]:
        """What ``found`` says of each field; its unknown entries beside those of its ``extra_args``."""
        rest = dict(found)
        known = settings_of(cls)
        given = {}
        for name in cls._names():
            if name in rest and not (rest[name] is None and (name not in known or known[name].default is not None)):
                given[name] = rest[name]
            rest.pop(name, None)
        for name, each in known.items():
            if each.off_flag is not None and each.switched_off(rest.pop(each.off_flag, None)):
                given[name] = False
        given["extra_args"] = {**entries(given.get("extra_args"), ()), **rest}
        return given

    @classmethod
    def _unknown(cls, name: str) -> str:
        near = difflib.get_close_matches(name, cls._names(), n=3)
        hint = f"did you mean {any_of(near)}" if near else f"expected one of {', '.join(cls._names())}"
        return f"{name!r} is no setting: {hint}; an entry of your own goes into extra_args={{{name!r}: ...}}"


def _checked_world(world_size: Any) -> int:
    if isinstance(world_size, bool) or not isinstance(world_size, int) or world_size < 1:
        raise ConfigError(f"world_size={world_size!r}: expected the number of ranks, at least 1")
    return world_size


def _raise_all(problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        raise ConfigError("\n".join(found))
