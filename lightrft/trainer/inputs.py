"""``InputConfig``: which models and which data a run is given."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightrft.strategy.configuration import Configuration
from lightrft.strategy.setting import setting

__all__ = ["InputConfig"]

_DATA = "Data"
_MODELS = "Models"


@dataclass(frozen=True, kw_only=True, repr=False)
class InputConfig(Configuration):
    """Models and data of a run, beside ``pretrain`` of ``StrategyConfig``. It cannot be changed once built.

    Raises:
        ConfigError: as ``StrategyConfig``.
    """

    prompt_data: str | None = setting(
        None, _DATA, "prompts to train on: a .jsonl or .parquet file, or a folder of the package datasets"
    )
    eval_data: str | None = setting(None, _DATA, "prompts that are evaluated and not trained on, in the same form")
    input_key: str = setting("prompt", _DATA, "field of the prompt: a text, or messages with role and content")
    label_key: str | None = setting(None, _DATA, "field of what rewards compare answers with")
    images_key: str | None = setting(None, _DATA, "field of the images of a prompt: one, or a list; it may be missing")
    system_prompt: str | None = setting(None, _DATA, "message that comes first; needs --apply_chat_template")
    apply_chat_template: bool = setting(False, _DATA, "write prompts as the chat template of the model does")

    critic_pretrain: str | None = setting(None, _MODELS, "model that the critic starts from; by default --pretrain")
    reward_pretrain: str | None = setting(None, _MODELS, "reward models: paths or names with commas between")
    lora_rank: int = setting(
        0, _MODELS, "train LoRA adapters of this rank in place of the actor's weights; 0: none", at_least=0
    )
    lora_alpha: float = setting(16.0, _MODELS, "their scale, divided by their rank", above=0)
    use_ema: bool = setting(False, _MODELS, "keep a moving average of the actor's weights")

    extra_args: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    """Entries that are no settings, read-only; ``get_extra_arg`` reads one."""

    @property
    def lora(self) -> dict[str, Any] | None:
        """Settings of ``peft.LoraConfig``, or ``None`` for no adapters."""
        return {"r": self.lora_rank, "lora_alpha": self.lora_alpha} if self.lora_rank else None

    @property
    def reward_models(self) -> list[str]:
        """The paths or names in ``reward_pretrain``."""
        return [each.strip() for each in (self.reward_pretrain or "").split(",") if each.strip()]

    @property
    def fields(self) -> dict[str, Any]:
        """What ``PromptDataset`` is told of the records."""
        names = ("input_key", "label_key", "images_key", "system_prompt", "apply_chat_template")
        return {name: getattr(self, name) for name in names}

    def _contradictions(self) -> Iterator[str]:
        if self.system_prompt is not None and not self.apply_chat_template:
            yield "system_prompt needs apply_chat_template: apply it, or put the message into the prompts"
        if self.use_ema and self.lora_rank:
            yield "use_ema with lora_rank: an average of weights that stay is of no use; leave out one of them"
