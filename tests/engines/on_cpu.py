"""Settings of an engine on this CPU, and models on disk for it."""

from __future__ import annotations

import torch

LENGTH = 64


def save(model, folder, *others):
    """Write ``model``, and tokenizers or processors beside it, to ``folder``, and return its path."""
    for each in (model, *others):
        each.save_pretrained(folder)
    return str(folder)


def settings(model, **others):
    """Of an engine on this CPU."""
    from lightrft.strategy.engine_settings import EngineSettings

    return EngineSettings(
        **{
            "model": model,
            "dtype": "float32",
            "tp_size": 1,
            "memory_share": 0.5,
            "max_model_len": LENGTH,
            "max_tokens": 8,
            "seed": 0,
            "sleeps": True,
            "device": torch.device("cpu"),
            "group": None,
            **others,
        }
    )
