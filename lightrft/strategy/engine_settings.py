"""What an adapter needs to know to start its engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist

from lightrft.errors import ConfigError
from lightrft.strategy.request_seeds import derived_seed
from lightrft.strategy.sources import ReadOnlyMapping
from lightrft.strategy.utils.agreement import Ranks

if TYPE_CHECKING:
    import torch

    from lightrft.strategy.config import StrategyConfig

__all__ = ["EngineSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """Settings of one engine, the same on all ranks of its group but for ``group``.

    Attributes:
        model: path or name of the model whose weights the engine has at first.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: that of the training, which the weights will have.
        tp_size: ranks that share the engine.
        memory_share: of the GPU, that the engine may use.
        max_model_len: most tokens of a prompt and its completion together.
        max_tokens: most tokens of a completion that does not say how many.
        seed: of the strategy.
        sleeps: whether the engine will be put to sleep.
        sleep_level: at which level; at 2 the engine need not be able to keep its weights.
        device: of this rank.
        group: the ranks that share the engine; ``None`` for a rank alone without a process group.
        options: arguments for the engine's own constructor, which win over what follows from the rest.
    """

    model: str
    dtype: Literal["float32", "bfloat16", "float16"]
    tp_size: int
    memory_share: float
    max_model_len: int
    max_tokens: int
    seed: int
    sleeps: bool
    device: torch.device
    group: dist.ProcessGroup | None
    sleep_level: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def engine_seed(self) -> int:
        """A seed of this engine's own: engines that draw alike would give the same prompt the same samples."""
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return derived_seed(self.seed, rank // self.tp_size)

    def too_long(self, positions: int | None) -> str:
        """What to add to what an engine says as it refuses them: nothing, unless they ask for more than the model has.

        Args:
            positions: most tokens that the model was made for, if it is known.
        """
        if positions is None or self.max_model_len <= positions:
            return ""
        return (
            f" (prompt_max_len + generate_max_len is {self.max_model_len}, and the model was made for {positions} "
            "tokens: lower one of them)"
        )

    @classmethod
    def of(
        cls, config: StrategyConfig, *, device: torch.device, group: dist.ProcessGroup | None, model: str | None = None
    ) -> EngineSettings:
        """Those that follow from the settings of a strategy.

        Args:
            config: its entry ``engine_options``, a mapping, gives ``options``.
            device: of this rank.
            group: the ranks that share the engine.
            model: instead of ``config.pretrain``.

        Raises:
            ConfigError: nothing names the model, or ``engine_options`` is no mapping.
        """
        name = model or config.pretrain
        if name is None:
            raise ConfigError("the engine needs a model: set pretrain to its path or name")
        options = config.get_extra_arg("engine_options") or {}
        if not isinstance(options, Mapping):
            raise ConfigError(f"engine_options is {options!r:.100}: expected a mapping of the engine's own arguments")
        return cls(
            model=name,
            dtype="bfloat16" if config.bf16 else "float16" if config.fp16 else "float32",
            tp_size=config.engine_tp_size,
            memory_share=config.engine_mem_util,
            max_model_len=config.prompt_max_len + config.generate_max_len,
            max_tokens=config.generate_max_len,
            seed=config.seed,
            sleeps=config.enable_engine_sleep,
            sleep_level=config.engine_sleep_level,
            device=device,
            group=group,
            options=ReadOnlyMapping(options),
        )

    def ranks(self) -> Ranks:
        """Those that share the engine.

        Raises:
            ConfigError: there are not as many as ``tp_size``.
        """
        ranks = Ranks(self.group) if self.group is not None else Ranks(rank=0, world_size=1)
        if ranks.world_size != self.tp_size:
            raise ConfigError(
                f"engine_tp_size={self.tp_size}, but {ranks.world_size} ranks share the engine: expected as many (the "
                "groups of ranks are those of the strategy's own settings)"
            )
        return ranks
