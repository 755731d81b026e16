"""The model behind a face of the fake engine, from a folder or from nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError
from lightrft.sim.engine.faces import current_mode
from lightrft.sim.engine.hash_model import HashModel
from lightrft.sim.engine.transformer_model import TransformerModel, checkpoint_tensors
from lightrft.strategy.utils.held_weights import DTYPES

if TYPE_CHECKING:
    import torch

    from lightrft.sim.engine.language_model import LanguageModel

__all__ = ["build", "model_config", "positions", "sampling_defaults", "tokenizer_of"]

_VOCABULARY = 32_000
"""Of a model of which nothing is known."""

_SAMPLING = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_k", "top_p", "min_p",
    "max_new_tokens",
)  # fmt: skip
"""What of a generation configuration says how to draw."""


def model_config(path: str) -> Mapping[str, Any]:
    """The configuration in the folder of a model; empty if there is none."""
    file = Path(path) / "config.json"
    found: Mapping[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return {**found, **(found.get("text_config") or {})}


def positions(config: Mapping[str, Any]) -> int | None:
    """Most tokens that a model was made for; ``None`` where its configuration does not say."""
    found = config.get("max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    stretched = rope.get("rope_type", rope.get("type")) in ("linear", "dynamic")
    return int(found * (rope.get("factor") or 1)) if found and stretched else found


def sampling_defaults(path: str) -> dict[str, Any]:
    """How the generation configuration in the folder of a model would draw, by vLLM's names."""
    file = Path(path) / "generation_config.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    names = {"max_new_tokens": "max_tokens"}
    return {names.get(name, name): found[name] for name in _SAMPLING if found.get(name) is not None}


def build(path: str, dtype: str, *, prefix_caching: bool, dummy: bool = False) -> LanguageModel:
    """The model in ``path``, with its weights.

    In hash mode the folder need not be there: then the engine takes what the first update sends.

    Args:
        path: folder of the model.
        dtype: of the engine's weights; ``"auto"`` is that of the configuration.
        prefix_caching: whether prompts that were seen are remembered.
        dummy: leave the weights at random values.

    Raises:
        ConfigError: the folder has no model, or no weights.
    """
    config = model_config(path)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32") if dtype == "auto" else str(dtype)
    precision = DTYPES.get(name.removeprefix("torch."))
    if precision is None:
        raise ConfigError(f"dtype {dtype!r}: expected one of auto, {', '.join(DTYPES)}")
    if current_mode() == "hash":
        return _hash_model(path, config, precision, prefix_caching)
    if not config:
        raise ConfigError(
            f"there is no model in {path}: the fake engine in model mode needs its folder, with config.json and "
            "weights; in hash mode it needs none"
        )
    model = TransformerModel(path, precision, prefix_caching=prefix_caching)
    if not dummy:
        if not any(Path(path).glob("*.safetensors")):
            raise ConfigError(f"there are no weights (*.safetensors) in {path}; load_format='dummy' needs none")
        model.load(checkpoint_tensors(path))
    return model


def _hash_model(path: str, config: Mapping[str, Any], dtype: torch.dtype, prefix_caching: bool) -> HashModel:
    ends = config.get("eos_token_id")
    weights = {name: tensor.to(dtype) for name, tensor in checkpoint_tensors(path)}
    model = HashModel(
        config.get("vocab_size") or _VOCABULARY,
        frozenset([ends] if isinstance(ends, int) else ends or []),
        shapes={name: tensor.shape for name, tensor in weights.items()},
        optional=frozenset({"lm_head.weight"}) if config.get("tie_word_embeddings") else frozenset(),
        prefix_caching=prefix_caching,
    )
    model.load(weights.items())
    return model


def tokenizer_of(path: str) -> Any:
    """The tokenizer in the folder of a model; ``None`` if there is none."""
    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)
