"""What the processes of SGLang hold, told through a file: SGLang has no call that returns it.

SGLang calls ``tell`` in each of its processes as one of its ``custom_weight_loader``, which get the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lightrft.strategy.utils import held_weights

__all__ = ["TELL", "question", "tell"]

TELL = f"{__name__}.tell"
"""By which SGLang finds it."""


def question(file: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> list[tuple[str, torch.Tensor]]:
    """What ``tell`` gets in the place of weights.

    Args:
        file: where it is answered.
        shapes: see ``held_weights``.
        dtype: of the engine.
    """
    return [(json.dumps({"file": str(file), "shapes": shapes, "dtype": dtype}), torch.zeros(1))]


def tell(model: torch.nn.Module, asked: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Write the fingerprints of the weights that ``model`` holds; what is asked is a ``question``. *Collective*."""
    wanted = json.loads(asked[0][0])
    rank, gather = _ranks()
    shapes = {name: tuple(shape) for name, shape in wanted["shapes"].items()}
    found = held_weights.fingerprints(model, shapes, dtype=held_weights.DTYPES.get(wanted["dtype"]), gather=gather)
    if rank == 0:
        Path(wanted["file"]).write_text(json.dumps(found), encoding="utf-8")


def _ranks() -> tuple[int, Callable[[Any], list[Any]] | None]:
    """The rank of this process in its tensor-parallel group, and how to gather there."""
    try:
        from sglang.srt.distributed import get_tp_group
    except ModuleNotFoundError:  # the fake engine, which has all of the model in one process
        return 0, None
    group = get_tp_group().cpu_group
    size = torch.distributed.get_world_size(group)

    def gather(value: Any) -> list[Any]:
        values: list[Any] = [None] * size
        torch.distributed.all_gather_object(values, value, group=group)
        return values

    return torch.distributed.get_rank(group), gather if size > 1 else None
