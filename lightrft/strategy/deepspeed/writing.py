"""Writing an engine into the folder of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightrft.strategy.deepspeed.parameters import full
from lightrft.strategy.utils.saving import persistent_buffers

__all__ = ["write"]

MODEL_FILE = "mp_rank_00_model_states.pt"


def write(engine: Any, folder: Path) -> None:
    """Write weights, and what the engine keeps for training, if it trains. *Collective*.

    A rank that cannot write raises when the last collective has ended: no other rank is left waiting in one.

    Args:
        engine: of DeepSpeed. Without an optimizer it writes nothing by itself: rank 0 holds the weights in host memory
            then, and writes one file.
        folder: exists.

    Raises:
        Exception: of writing, on the rank that could not.
    """
    if engine.basic_optimizer is None:
        _write_weights(engine.module, folder)
        return
    with _errors_put_off(engine):
        engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)


def _write_weights(module: torch.nn.Module, folder: Path) -> None:
    writes = dist.get_rank() == 0
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in full(module):
        if writes:
            weights[name] = parameter.detach().to("cpu", copy=True)
    if writes:
        buffers = {name: buffer.cpu() for name, buffer in persistent_buffers(module).items()}
        entries = {"module": weights | buffers, "buffer_names": list(buffers), "param_shapes": [], "shared_params": {}}
        torch.save(entries, folder / MODEL_FILE)


@contextmanager
def _errors_put_off(engine: Any) -> Iterator[None]:
    """Let whatever DeepSpeed writes fail at the end of this context: between two files it waits for other ranks."""
    errors: list[Exception] = []

    def put_off(action: Callable[..., None]) -> Callable[..., None]:
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                action(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - it is raised below
                errors.append(error)

        return attempt

    files = engine.checkpoint_engine
    replaced = [(files, "save"), (files, "makedirs"), (engine, "_copy_recovery_script")]
    for owner, name in replaced:
        setattr(owner, name, put_off(getattr(owner, name)))
    try:
        yield
    finally:
        for owner, name in replaced:
            delattr(owner, name)
    if errors:
        raise errors[0]
