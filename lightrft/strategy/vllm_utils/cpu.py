"""What vLLM needs on a CPU beside what it does itself."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    import torch

    from lightrft.strategy.utils.agreement import Ranks

__all__ = ["pack_output_layer", "remove_names_of_shared_memory"]

_SHARED_MEMORY = Path("/dev/shm")


def pack_output_layer(model: torch.nn.Module) -> None:
    """Pack the output layer anew: vLLM keeps a packed copy, and leaves it old where the weight is the embedding's."""
    for name, layer in model.named_modules():
        if name.endswith("lm_head") and hasattr(layer, "cpu_linear"):
            layer.quant_method.process_weights_after_loading(layer)


def remove_names_of_shared_memory(ranks: Ranks) -> None:
    """Remove the names of the memory over which ranks exchange activations; what they have opened stays until they end.

    The names are the same in every run, and vLLM leaves them behind: no later run of this user could start on this
    machine. So they are removed when all ranks have opened the memory, and before, if a run died while it started.

    Args:
        ranks: that exchange activations.
    """
    members = f"-[{'-'.join(str(rank) for rank in dist.get_process_group_ranks(ranks.group))}]-cpushm_"
    for file in _SHARED_MEMORY.iterdir() if _SHARED_MEMORY.is_dir() else ():
        with suppress(FileNotFoundError):  # another rank was faster
            if members in file.name and file.stat().st_uid == os.getuid():
                file.unlink()
