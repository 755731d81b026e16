"""What DeepSpeed wrote into the folder of a checkpoint, read piece by piece."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightrft.errors import CheckpointError
from lightrft.strategy.deepspeed.pieces import Piece, evenly_split, laid_out

__all__ = ["SavedEngine"]

_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class SavedEngine:
    """The files of one engine, of any ZeRO stage and any number of ranks. What is not asked for is not read.

    An engine that does not train has written one file with whole weights: they count as frozen ones at stage 0.

    Args:
        folder: that was given to DeepSpeed.

    Raises:
        CheckpointError: files are missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = _by_rank(folder)
        self._read: dict[int, dict[str, Any]] = {}
        self._models: dict[int, dict[str, Any]] = {}
        if not self._files and self.shapes:
            raise CheckpointError(f"{folder} has no file of the optimizer of any rank: the checkpoint is incomplete")

    @property
    def trains(self) -> bool:
        """Whether there are masters and an optimizer."""
        return bool(self._files)

    def open(self, ranks: Iterable[int], names: Iterable[str]) -> None:
        """Read what it takes to put ``names`` together, and the optimizer files of ``ranks``; tensors stay on disk.

        Raises:
            CheckpointError: files are missing or damaged.
        """
        needed, wanted = set(ranks), set(names)
        for name in wanted & self.pieces_of.keys():
            needed |= {rank for rank, _ in self.pieces_of[name]}
        for rank in sorted(needed):
            self.optimizer(rank)
        if self.stage == 3 and wanted & set(self.frozen_names):
            for rank in self._files:
                self._model(rank)

    @cached_property
    def common(self) -> dict[str, Any]:
        """What rank 0 wrote beside the optimizer: counters, names, buffers."""
        return _load(self._folder / self._model_file(0))

    @cached_property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.optimizer(0)["zero_stage"]) if self.trains else 0

    @cached_property
    def pieces(self) -> list[list[Piece]]:
        """Of each rank, where its pieces lie in :meth:`masters` and :meth:`states`."""
        if self.stage == 3:
            groups = [{name: shape.numel() for name, shape in group.items()} for group in self.common["param_shapes"]]
            return [list(evenly_split(groups, rank, len(self._files))) for rank in self._files]
        mappings = [self.optimizer(rank)["param_slice_mappings"] for rank in self._files]
        return laid_out([[_addresses(group) for group in groups] for groups in mappings])

    @cached_property
    def pieces_of(self) -> dict[str, list[tuple[int, Piece]]]:
        """The pieces of each parameter that was trained, with the rank that saved them."""
        found: dict[str, list[tuple[int, Piece]]] = {name: [] for name in self.shapes}
        for rank, pieces in enumerate(self.pieces):
            for piece in pieces:
                found[piece.name].append((rank, piece))
        return found

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the parameters that were trained, by name."""
        return {name: shape for group in self.common["param_shapes"] for name, shape in group.items()}

    @property
    def groups(self) -> list[dict[str, Any]]:
        """Hyper-parameters of the optimizer's parameter groups."""
        found: list[dict[str, Any]] = self._base(0)["param_groups"]
        return found

    def optimizer(self, rank: int) -> dict[str, Any]:
        """What DeepSpeed's optimizer of one rank wrote."""
        if rank not in self._read:
            self._read[rank] = _load(self._files[rank])["optimizer_state_dict"]
        return self._read[rank]

    def masters(self, rank: int) -> list[torch.Tensor]:
        """The flat tensors of weights in fp32 of one rank."""
        found: list[torch.Tensor] = self.optimizer(rank)[
            "fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"
        ]
        return found

    def whole(self, name: str) -> torch.Tensor:
        """The weight in fp32 of a parameter that was trained, put together."""
        return self.joined(name, lambda rank, number: self.masters(rank)[number])

    def joined(self, name: str, flat: Callable[[int, int], torch.Tensor]) -> torch.Tensor:
        """A parameter that was trained, or a state of it, put together.

        Args:
            name: of the parameter.
            flat: gives the tensor that holds it, by rank and number of the flat tensor.
        """
        pieces = [(flat(rank, piece.flat).detach(), piece) for rank, piece in self.pieces_of[name]]
        found = torch.empty(self.shapes[name].numel(), dtype=pieces[0][0].dtype)
        for tensor, piece in pieces:
            found[piece.start : piece.start + piece.length] = tensor[piece.offset : piece.offset + piece.length]
        return found.view(self.shapes[name])

    def states(self, rank: int) -> Mapping[int, Mapping[str, Any]]:
        """The optimizer's states of one rank, by the number of the flat tensor; empty before the first step."""
        found: Mapping[int, Mapping[str, Any]] = self._base(rank)["state"]
        return found

    def frozen_shapes(self) -> dict[str, torch.Size]:
        """Of the parameters that were not trained, by name."""
        if self.stage == 3:
            return dict(self.common["frozen_param_shapes"] or {})
        return {name: self.common["module"][name].shape for name in self.frozen_names}

    @property
    def frozen_names(self) -> list[str]:
        """Names of the parameters that were not trained; below stage 3, further names of tied ones too."""
        if self.stage == 3:
            return list(self.common["frozen_param_shapes"] or {})
        known = self.shapes.keys() | set(self.common["buffer_names"])
        return [name for name in self.common["module"] if name not in known]

    def frozen_one(self, name: str) -> torch.Tensor:
        """A parameter that was not trained, whole."""
        if self.stage != 3:
            found: torch.Tensor = self.common["module"][name]
            return found
        shape = self.common["frozen_param_shapes"][name]
        shares = [self._model(rank)["frozen_param_fragments"][name] for rank in self._files]
        return torch.cat([share.flatten() for share in shares])[: shape.numel()].view(shape)

    def buffers(self) -> dict[str, torch.Tensor]:
        """Buffers, by name."""
        return {name: self.common["module"][name] for name in self.common["buffer_names"]}

    def _base(self, rank: int) -> dict[str, Any]:
        found: dict[str, Any] = self.optimizer(rank)[
            "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        ]
        return found

    def _model(self, rank: int) -> dict[str, Any]:
        if rank not in self._models:
            self._models[rank] = self.common if rank == 0 else _load(self._folder / self._model_file(rank))
        return self._models[rank]

    def _model_file(self, rank: int) -> str:
        partitioned = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        return partitioned if (self._folder / partitioned).exists() else "mp_rank_00_model_states.pt"


def _addresses(mapping: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return {name: (address.start, address.numel) for name, address in mapping.items()}


def _by_rank(folder: Path) -> dict[int, Path]:
    matches = [match for path in folder.iterdir() if (match := _OPTIMIZER_FILE.fullmatch(path.name))]
    found = {int(match[1]): folder / match[0] for match in matches}
    if sorted(found) != list(range(len(found))):
        raise CheckpointError(
            f"{folder} has optimizer files of the ranks {sorted(found)}: expected those of all ranks that saved, from "
            "0 on; the checkpoint is incomplete, or not DeepSpeed's"
        )
    return dict(sorted(found.items()))


def _load(path: Path) -> dict[str, Any]:
    """Tensors stay on disk until they are used."""
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing: the checkpoint is incomplete") from error
    except Exception as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}): load another one") from error
    return found
