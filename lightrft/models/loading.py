"""Models of transformers and their parts, read from checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightrft.errors import ConfigError
from lightrft.strategy.deepspeed.parameters import gathered, is_partitioned
from lightrft.strategy.extras import naming_extras
from lightrft.strategy.utils.saving import OUTSIDE

__all__ = ["body_of", "head_of", "language_model_of", "with_adapters"]


def language_model_of(path: str, dtype: torch.dtype | None, lora: Any, seed: int, **kwargs: Any) -> nn.Module:
    """The language model at ``path``, one that sees if that is what it is; with adapters if ``lora`` says so.

    Args:
        path: a folder or a name. A folder of adapters is read with the model that they were made for.
        dtype: of the weights; fp32 if ``None``.
        lora: see ``with_adapters``.
        seed: the same.
        kwargs: of ``from_pretrained``.
    """
    import transformers

    base = _base_of(path)
    sees = getattr(transformers.AutoConfig.from_pretrained(base), "vision_config", None) is not None
    kind = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    model: nn.Module = kind.from_pretrained(base, dtype=dtype or torch.float32, **kwargs)
    return _adapted(model, path, lora, seed, task_type="CAUSAL_LM")


def body_of(path: str, dtype: torch.dtype | None, lora: Any, seed: int, **kwargs: Any) -> nn.Module:
    """What ``path`` holds without its output layer; with it, if that gives one score (sequence classification).

    Raises:
        ConfigError: it gives several scores.
    """
    import transformers

    base = _base_of(path)
    config: Any = transformers.AutoConfig.from_pretrained(base)
    kwargs["dtype"] = dtype or torch.float32
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return _adapted(transformers.AutoModel.from_pretrained(base, **kwargs), path, lora, seed)
    if config.num_labels != 1:
        raise ConfigError(
            f"{path} gives {config.num_labels} scores a sequence: expected a reward model, which gives one"
        )
    model: nn.Module = transformers.AutoModelForSequenceClassification.from_pretrained(base, **kwargs)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ConfigError(f"{type(model).__name__} has no linear layer 'score': expected a decoder with one on top")
    return _adapted(model, path, lora, seed)


def head_of(path: str, name: str) -> Tensor | None:
    """The weight ``name`` that ``strategy.save_model`` wrote beside the model in ``path``, if there is one."""
    from safetensors import safe_open

    file = Path(path) / OUTSIDE
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as opened:
        found: Tensor | None = opened.get_tensor(name) if name in opened.keys() else None  # noqa: SIM118 - no mapping
    return found


def with_adapters(model: nn.Module, lora: Any, seed: int, **defaults: Any) -> nn.Module:
    """``model`` with LoRA adapters, which alone are trained.

    Args:
        model: of transformers.
        lora: a ``peft.LoraConfig``, or settings of one, all linear layers by default; ``None`` for no adapters.
        seed: of their first weights.
        defaults: settings that ``lora`` may change.

    Raises:
        ConfigError: peft is missing, or the settings are none.
    """
    if lora is None:
        return model
    with naming_extras("lora"):
        import peft
    if isinstance(lora, Mapping):
        settings = {"target_modules": "all-linear", **defaults, **lora}
        try:
            lora = peft.LoraConfig(**settings)
        except TypeError as error:
            raise ConfigError(f"lora={dict(settings)!r}: expected settings of peft.LoraConfig; {error}") from error
    # Adapters in another dtype than the weights beside them would be sharded apart.
    adapted: nn.Module = peft.get_peft_model(model, lora, autocast_adapter_dtype=False)  # type: ignore[arg-type, unused-ignore]
    _set_first_weights(adapted, lora.init_lora_weights, seed)
    return adapted


def _set_first_weights(model: nn.Module, way: Any, seed: int) -> None:
    """Give the adapters the same first weights everywhere. *Collective* where ZeRO-3 has spread them over the ranks.

    There it has done so before PEFT could set them, and PEFT has set nothing.
    """
    layers: list[Any] = [one for one in model.modules() if hasattr(one, "reset_lora_parameters")]
    if way is False:
        return
    if way not in {True, "gaussian"}:
        if any(is_partitioned(parameter) for parameter in model.parameters()):
            raise ConfigError(
                f"init_lora_weights={way!r} at ZeRO 3: expected True, False or 'gaussian'; others start from the "
                "model's weights, which no rank has whole: build it outside of init_model_context()"
            )
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in layers:
            adapters = [parameter for name, parameter in layer.named_parameters() if "lora_" in name]
            spread = any(is_partitioned(parameter) for parameter in adapters)
            with gathered(adapters, written_by=0) if spread else nullcontext():
                for name in layer.active_adapters:
                    layer.reset_lora_parameters(name, way)


def _adapted(model: nn.Module, path: str, lora: Any, seed: int, **defaults: Any) -> nn.Module:
    """``model`` with the adapters at ``path`` if there are any, else with new ones if ``lora`` asks for them."""
    if _base_of(path) == path:
        return with_adapters(model, lora, seed, **defaults)
    if lora is not None:
        raise ConfigError(f"{path} holds adapters already: leave lora out, or give the path of a model without any")
    from peft import PeftModel

    return PeftModel.from_pretrained(model, path, is_trainable=True, autocast_adapter_dtype=False)  # type: ignore[no-any-return, arg-type, unused-ignore]


def _base_of(path: str) -> str:
    """Where the model is whose adapters are at ``path``; ``path`` if there are none."""
    file = Path(path) / "adapter_config.json"
    return str(json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]) if file.is_file() else path
