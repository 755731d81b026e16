"""What a checkpoint of DeepSpeed holds, whatever ZeRO stage and number of ranks wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lightrft.errors import CheckpointError
from lightrft.strategy.deepspeed.saved import SavedEngine
from lightrft.strategy.utils.ckpt_scripts.contents import WEIGHT, Contents, Place, Spec, settings_of

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DeepSpeedContents"]


class DeepSpeedContents(Contents):
    """Weights of trained parameters are their fp32 masters; a parameter is put together when it is read.

    Args:
        folder: with the files of the ranks.

    Raises:
        CheckpointError: files are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.saved = SavedEngine(folder)
        self._folder = folder
        try:
            self._survey()
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(
                f"{folder} is not laid out as DeepSpeed's ZeRO does it ({type(error).__name__}: {error}): convert "
                "another checkpoint"
            ) from error

    def _survey(self) -> None:
        shapes = self.saved.shapes
        self._check_coverage()
        aliases = set(self.saved.common["shared_params"] or {})
        self._frozen = {name for name in self.saved.frozen_names if name not in aliases}
        self._buffers = self.saved.buffers()
        self.specs = {Place(name): Spec.of(tensor) for name, tensor in self._buffers.items()}
        self.specs |= {Place(name): self._frozen_spec(name) for name in self._frozen}
        for name, shape in shapes.items():
            self.specs[Place(name)] = Spec(tuple(shape), self._example(name).dtype)
            for key, value in self._states(name).items():
                self.specs[Place(name, key)] = (
                    Spec(tuple(shape), value.dtype) if self._is_elementwise(name, value) else Spec((), torch.float32)
                )
        if self.saved.trains:
            self.groups = self._groups()
            self.loss_scale = self._loss_scale()

    def _frozen_spec(self, name: str) -> Spec:
        if self.saved.stage != 3:
            return Spec.of(self.saved.frozen_one(name))
        shape = self.saved.common["frozen_param_shapes"][name]
        return Spec(tuple(shape), self.saved.common["frozen_param_fragments"][name].dtype)

    def _check_coverage(self) -> None:
        for name, shape in self.saved.shapes.items():
            found = sum(piece.length for _, piece in self.saved.pieces_of[name])
            if found != shape.numel():
                raise CheckpointError(
                    f"{self._folder} holds {found} of the {shape.numel()} elements of {name}: files of some ranks are "
                    "of another run; convert another checkpoint"
                )

    def _example(self, name: str) -> torch.Tensor:
        """A flat tensor with a piece of the parameter."""
        rank, piece = self.saved.pieces_of[name][0]
        return self.saved.masters(rank)[piece.flat]

    def _states(self, name: str) -> dict[str, Any]:
        """States of the flat tensor with the first piece of the parameter."""
        rank, piece = self.saved.pieces_of[name][0]
        found = self.saved.states(rank).get(piece.flat, {})
        return {key: value for key, value in found.items() if torch.is_tensor(value) or isinstance(value, int | float)}

    def _is_elementwise(self, name: str, value: Any) -> bool:
        return torch.is_tensor(value) and value.dim() > 0 and value.numel() >= self._example(name).numel()

    def _groups(self) -> list[dict[str, Any]]:
        flats = [list(names) for names in self.saved.common["param_shapes"]]
        return [
            {**settings_of(group), "params": [name for flat in group["params"] for name in flats[flat]]}
            for group in self.saved.groups
        ]

    def _loss_scale(self) -> tuple[float, int] | None:
        scaler = self.saved.optimizer(0)["loss_scaler"]
        if not getattr(scaler, "dynamic", False):
            return None
        good = scaler.cur_iter - scaler.last_overflow_iter - 1
        return float(scaler.cur_scale), int(good % scaler.scale_window)

    def read(self, place: Place) -> torch.Tensor:
        """As in ``Contents``."""
        if place.name in self._buffers:
            return self._buffers[place.name]
        if place.name in self._frozen:
            return self.saved.frozen_one(place.name).detach()
        if place.key != WEIGHT and not self._is_elementwise(place.name, value := self._states(place.name)[place.key]):
            return torch.as_tensor(value, dtype=torch.float32).reshape(())
        if place.key == WEIGHT:
            return self.saved.whole(place.name)
        return self.saved.joined(place.name, lambda rank, number: self._state(rank, number, place.key))

    def _state(self, rank: int, number: int, key: str) -> torch.Tensor:
        states = self.saved.states(rank).get(number, {})
        if key not in states:
            raise CheckpointError(
                f"{self._folder}: rank {rank} saved no {key}, which other ranks have: convert another checkpoint"
            )
        found: torch.Tensor = states[key]
        return found
