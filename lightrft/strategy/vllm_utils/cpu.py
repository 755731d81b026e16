"""What vLLM needs on a CPU beside what it does itself."""

from __future__ import annotations

import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from lightrft.strategy.utils.agreement import Ranks

__all__ = ["pack_output_layer", "without_names_of_shared_memory"]

_SHARED_MEMORY = Path("/dev/shm")


def pack_output_layer(model: torch.nn.Module) -> None:
    """Pack the output layer anew: vLLM keeps a packed copy, and leaves it old where the weight is the embedding's."""
    for name, layer in model.named_modules():
        if name.endswith("lm_head") and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


@contextmanager
def without_names_of_shared_memory(ranks: Ranks) -> Iterator[None]:
    """Let vLLM make the memory over which ranks exchange activations, and remove its names once all have opened it.

    The memory itself stays until they end. Its names are the same in every run, and vLLM leaves them behind: then no
    later run of this user could start on this machine. Those of a run that died while it started are removed before.

    Args:
        ranks: that exchange activations.
    """
    if ranks.world_size == 1 or not _SHARED_MEMORY.is_dir():
        yield
        return
    members = f"-[{'-'.join(str(rank) for rank in dist.get_process_group_ranks(ranks.group))}]-cpushm_"
    _remove(members)
    ranks.gather(None)  # nobody starts before all have removed theirs
    yield
    ranks.gather(None)
    _remove(members)


def _remove(part: str) -> None:
    for file in _SHARED_MEMORY.iterdir():
        with suppress(FileNotFoundError):  # another rank was faster
            if part in file.name and file.stat().st_uid == os.getuid():
                file.unlink()
