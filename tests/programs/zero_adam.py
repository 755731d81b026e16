"""DeepSpeed's own optimizers, whose compiled operations simulated ranks compute with torch."""

from __future__ import annotations

import torch

from programs import tiny, zero


def _fused(stage, **settings):
    zero.start()
    adam = {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}}
    settings = zero.config(stage, optimizer=adam, **settings)
    engine, *_ = zero.deepspeed.initialize(
        model=(model := tiny.transformer()), model_parameters=model.parameters(), config=settings
    )
    losses, norms = zero.train(engine)
    result = tiny.told(losses, zero.weights(engine), norms, optimizer=type(engine.basic_optimizer).__name__)
    zero.end(engine)
    return result


def zero2_fused_adam():
    return _fused(2)


def zero3_fused_adam():
    return _fused(3)


def zero2_cpu_adam():
    return _fused(2, zero={"offload_optimizer": {"device": "cpu"}})


def zero3_cpu_adam():
    return _fused(3, zero={"offload_optimizer": {"device": "cpu"}})


def zero2_torch_adam():
    """The same with torch's AdamW, which the others have to equal."""
    zero.start()
    model = tiny.transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    engine = zero.engine_of(model, zero.config(2), optimizer)
    losses, norms = zero.train(engine)
    result = tiny.told(losses, zero.weights(engine), norms)
    zero.end(engine)
    return result
