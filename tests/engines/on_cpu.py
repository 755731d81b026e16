"""Engines on this CPU: their settings, models on disk for them, and what the contracts need to know."""

from __future__ import annotations

import torch

from lightrft.models import tiny

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


def pair(**more):
    """Two models of one architecture, all of whose weights differ."""
    return tiny.text_model(0, **more), tiny.text_model(1, **more)


def subject(name, start, models, **more):
    """Engines of these models, for the contracts."""
    from lightrft.sim.contracts.engine import LACKS, Subject

    letters = tiny.tokenizer()
    return Subject(
        **{
            "start": start,
            "models": models,
            "name": name,
            "vocabulary": tiny.VOCABULARY,
            "max_model_len": LENGTH,
            "max_tokens": 8,
            "end": tiny.EOS,
            "first_token": len(tiny.SPECIAL),
            "encode": letters.encode,
            "decode": lambda ids: letters.decode(ids, skip_special_tokens=True),
            "lacks": LACKS[name],
            "library_calls": lambda engine: len(engine.library_calls),
            **more,
        }
    )


def counting(engine):
    """The same engine, which writes down how its library is called for updates in ``library_calls``."""
    engine.library_calls = []
    owner, name = (
        (engine._llm, "collective_rpc")
        if hasattr(engine, "_llm")
        else (engine._launched.engine, "update_weights_from_tensor")
    )
    original = getattr(owner, name)

    def counted(*args, **kwargs):
        engine.library_calls.append(name)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    return engine
