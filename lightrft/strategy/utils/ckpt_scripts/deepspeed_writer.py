"""Writing a checkpoint of DeepSpeed, as one rank would."""

from __future__ import annotations

import shutil
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.extras import naming_extras
from lightrft.strategy.utils.ckpt_scripts.contents import WEIGHT, Contents, Place, Spec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from lightrft.strategy.utils.ckpt_scripts.progress import Progress

__all__ = ["Flattened", "write"]

_STEP = "step"
_ALIGNMENT = 2  # elements, for each rank: ZeRO 1 and 2 fill flat tensors up to it


class Flattened(Contents):
    """Contents as ZeRO can hold them: fp32 masters, and in each group the same states for every parameter.

    A parameter without states, which no gradient has reached yet, has states of zeros.

    Args:
        contents: with an optimizer.

    Raises:
        ConfigError: there is no optimizer.
        CheckpointError: there are states that ZeRO cannot hold.
    """

    def __init__(self, contents: Contents) -> None:
        if contents.groups is None:
            raise ConfigError(
                "the source holds no optimizer, and without one there is no telling which weights DeepSpeed is to "
                "train: convert to hf, and load the folder into the model before it is prepared"
            )
        self._contents = contents
        self.groups = contents.groups
        self.loss_scale = contents.loss_scale
        trained = set(self.trained)
        missing = sorted(name for name in trained if Place(name) not in contents.specs)
        if missing:
            raise CheckpointError(f"the optimizer trains {', '.join(missing[:5])}, of which the source has no weights")
        self._specs = {place: spec for place, spec in contents.specs.items() if place.name not in trained}
        self._steps = [_step_of(contents, group["params"]) for group in self.groups]
        self._step_at: dict[Place, torch.Tensor] = {}
        for group, step in zip(self.groups, self._steps, strict=True):
            self._add(group["params"], step)
        self.specs = self._specs

    def _add(self, names: list[str], step: torch.Tensor | None) -> None:
        self._check_shapes(names)
        specs = self._contents.specs
        keys = self.keys_of(names)
        for name in names:
            shape = specs[Place(name)].shape
            self._specs |= {Place(name, key): Spec(shape, torch.float32) for key in (WEIGHT, *keys)}
            if step is not None:
                self._step_at[Place(name, _STEP)] = step
                self._specs[Place(name, _STEP)] = Spec((), torch.float32)

    def keys_of(self, names: list[str]) -> list[str]:
        """The states, by element, of the parameters of a group."""
        wanted = set(names)
        keys = {place.key for place in self._contents.specs if place.name in wanted}
        return sorted(keys - {WEIGHT, _STEP})

    def _check_shapes(self, names: list[str]) -> None:
        wanted = set(names)
        for place, spec in self._contents.specs.items():
            if place.name not in wanted or place.key == _STEP:
                continue
            shape = self._contents.specs[Place(place.name)].shape
            if spec.shape != shape:
                raise CheckpointError(
                    f"{place} has shape {spec.shape}, and the parameter {shape}: ZeRO holds states of the same shape, "
                    "such as those of AdamW; convert to hf"
                )

    def read(self, place: Place) -> torch.Tensor:
        """As in ``Contents``."""
        if place in self._step_at:
            return self._step_at[place]
        spec = self.specs[place]
        if place not in self._contents.specs:
            return torch.zeros(spec.shape, dtype=spec.dtype)
        return self._contents.read(place).to(spec.dtype)

    def step_of(self, group: int) -> torch.Tensor | None:
        """How often the parameters of a group were stepped; ``None`` for never."""
        return self._steps[group]


def _step_of(contents: Contents, names: list[str]) -> torch.Tensor | None:
    steps = {name: contents.read(Place(name, _STEP)) for name in names if Place(name, _STEP) in contents.specs}
    if not steps:
        return None
    least, most = min(steps, key=lambda name: steps[name].item()), max(steps, key=lambda name: steps[name].item())
    if steps[least] != steps[most]:
        raise CheckpointError(
            f"{least} was stepped {steps[least].item():g} times and {most}, of the same parameter group, "
            f"{steps[most].item():g} times: ZeRO counts the steps of a group as a whole; convert to hf"
        )
    return steps[least].to(torch.float32)


def write(flattened: Flattened, folder: Path, progress: Progress, *, stage: int, steps: int) -> None:
    """Write what any ZeRO stage and any number of ranks read from ``folder``.

    Flat tensors are put together in files that are mapped into memory, and deleted afterwards.

    Args:
        flattened: what is written.
        folder: exists.
        progress: is told.
        stage: in the layout of which it is written.
        steps: optimizer steps until now.
    """
    with naming_extras("writing a checkpoint of DeepSpeed"):
        import deepspeed
    common = {"ds_version": deepspeed.__version__, "ds_config": {"zero_optimization": {"stage": stage}}}
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    torch.save(_model(flattened, steps) | common, folder / f"{prefix}mp_rank_00_model_states.pt")
    scratch = folder / "scratch"
    scratch.mkdir()
    optimizer = _Flats(flattened, scratch, progress).optimizer(stage)
    torch.save({"optimizer_state_dict": optimizer | common, **common}, folder / _OPTIMIZER_FILE)
    shutil.rmtree(scratch)


_OPTIMIZER_FILE = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def _model(flattened: Flattened, steps: int) -> dict[str, Any]:
    """What is no part of the optimizer. Buffers cannot be told from frozen parameters, and are written with them."""
    trained = set(flattened.trained)
    rest = {place.name: flattened.read(place).clone() for place in flattened.specs if place.name not in trained}
    return {
        "module": rest,
        "buffer_names": [],
        "param_shapes": [
            OrderedDict((name, torch.Size(flattened.specs[Place(name)].shape)) for name in group["params"])
            for group in flattened.groups or []
        ],
        "frozen_param_shapes": OrderedDict((name, one.shape) for name, one in rest.items()),
        "frozen_param_fragments": OrderedDict(rest),
        "shared_params": {},
        "optimizer": None,
        "lr_scheduler": None,
        "global_steps": steps,
        "global_samples": 0,
        "skipped_steps": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
    }


class _Flats:
    """The flat tensors of all groups."""

    def __init__(self, flattened: Flattened, scratch: Path, progress: Progress) -> None:
        self._contents = flattened
        self._scratch = scratch
        self._progress = progress

    def optimizer(self, stage: int) -> dict[str, Any]:
        """What the optimizer of one rank saves."""
        groups = self._contents.groups or []
        alignment = 1 if stage == 3 else _ALIGNMENT
        masters = [self._flat(group["params"], WEIGHT, alignment) for group in groups]
        states = {number: self._states(number, group["params"], alignment) for number, group in enumerate(groups)}
        base = {
            "state": {number: state for number, state in states.items() if state},
            "param_groups": [{**group, "params": [number]} for number, group in enumerate(groups)],
        }
        found = {
            "zero_stage": stage,
            "loss_scaler": _loss_scaler(self._contents.loss_scale),
            "dynamic_loss_scale": self._contents.loss_scale is not None,
            "overflow": False,
        }
        if stage == 3:
            return found | {"partition_count": 1, "fp32_flat_groups": masters, "optimizer_state_dict": base}
        return found | {
            "partition_count": [1] * len(groups),
            "group_paddings": [0] * len(groups),
            "single_partition_of_fp32_groups": masters,
            "base_optimizer_state": base,
            "param_slice_mappings": [self._addresses(group["params"]) for group in groups],
        }

    def _states(self, number: int, names: list[str], alignment: int) -> dict[str, torch.Tensor]:
        found = {key: self._flat(names, key, alignment) for key in self._contents.keys_of(names)}
        step = self._contents.step_of(number)
        return found if step is None else {_STEP: step, **found}

    def _flat(self, names: list[str], key: str, alignment: int) -> torch.Tensor:
        count = sum(self._contents.specs[Place(name)].numel for name in names)
        count = -(-count // alignment) * alignment
        file = self._scratch / f"{len(list(self._scratch.iterdir()))}"
        flat = torch.from_file(str(file), shared=True, size=count, dtype=torch.float32)  # a new file holds zeros
        offset = 0
        for name in names:
            value = self._contents.read(Place(name, key)).reshape(-1)
            flat[offset : offset + len(value)] = value
            offset += len(value)
            self._progress.add(value.nbytes)
        return flat

    def _addresses(self, names: list[str]) -> Mapping[str, Any]:
        from deepspeed.utils.tensor_fragment import fragment_address

        found, offset = OrderedDict(), 0
        for name in names:
            numel = self._contents.specs[Place(name)].numel
            found[name] = fragment_address(start=offset, numel=numel)
            offset += numel
        return found


def _loss_scaler(loss_scale: tuple[float, int] | None) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

    if loss_scale is None:
        return LossScaler(scale=1.0)
    value, good_steps = loss_scale
    scaler = DynamicLossScaler(
        init_scale=value, scale_window=1000, min_scale=1, delayed_shift=2, consecutive_hysteresis=False
    )
    scaler.cur_iter = good_steps
    return scaler
