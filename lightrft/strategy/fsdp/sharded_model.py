"""One sharded model: its gradients, its optimizer steps, what is written of it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.backend_strategy import Loading, Step
from lightrft.strategy.fsdp import fsdp_checkpoint as checkpoint
from lightrft.strategy.fsdp.fsdp_optimizer import Masters, StateMover
from lightrft.strategy.fsdp.fsdp_utils import forget_gradients, let_go, local, sharded_parameters
from lightrft.strategy.utils.agreement import Ranks
from lightrft.strategy.utils.gradients import global_norm

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from torch.optim import Optimizer

    from lightrft.strategy.utils.loss_scale import LossScale

__all__ = ["ShardedModel"]

_EPSILON = 1e-6
"""What ``torch.nn.utils.clip_grad_norm_`` adds to the norm before it divides by it."""


class ShardedModel:
    """What a model needs beside what ``fully_shard`` made of it.

    Args:
        module: sharded already. It is not kept alive.
        device: of this rank.
        masters: whether the optimizer steps fp32 masters of 16-bit parameters.
        loss_scale: of fp16; ``None`` for none.
    """

    def __init__(self, module: nn.Module, device: torch.device, *, masters: bool, loss_scale: LossScale | None) -> None:
        self._device = device
        self._parameters = sharded_parameters(module)
        self.masters = Masters(self._parameters.values() if masters else ())
        self.loss_scale = loss_scale
        self.optimizer: Optimizer | None = None
        self.mover: StateMover | None = None
        self._synchronizes = True

    @property
    def kept(self) -> dict[str, nn.Parameter]:
        """The parameters by name, in the precision they are kept in: masters in place of what has one.

        What was being moved has arrived then.
        """
        self._wait()
        return {name: self.masters.of(one) for name, one in self._parameters.items()}

    def adopt(self, optimizer: Optimizer) -> None:
        """Step with ``optimizer`` from now on.

        Raises:
            ConfigError: it steps other parameters.
        """
        mine = {*self._parameters.values(), *self.masters.pairs.values()}
        strangers = sum(one not in mine for group in optimizer.param_groups for one in group["params"])
        if strangers:
            raise ConfigError(
                f"{type(optimizer).__name__} steps {strangers} parameters that the prepared model does not have: an "
                "optimizer made before prepare() is passed to prepare() with its model, or made again afterwards"
            )
        self.masters.adopt(optimizer)
        self.optimizer = optimizer
        self.mover = StateMover(optimizer, self.masters, self._device)

    # -- Training -----------------------------------------------------------------------------------------------------

    def backward(self, module: Any, loss: torch.Tensor, *, parts: int, last: bool, **kwargs: Any) -> None:
        """Add the gradient of ``loss / parts``; the ranks exchange gradients only if ``last``.

        Until then each rank holds the whole gradient, in the dtype it is reduced in.
        """
        if self._synchronizes != last:
            module.set_requires_gradient_sync(last)
            self._synchronizes = last
        factor = (1.0 if self.loss_scale is None else self.loss_scale.scale) / parts
        (loss if factor == 1 else loss * factor).backward(**kwargs)

    def step(self, module: nn.Module, max_norm: float) -> Step:
        """Clip to ``max_norm`` (0: never), step unless the norm is not finite, clear the gradients.

        The norm is the same on every rank, and so all of them step or none does.
        """
        if self.optimizer is None:
            raise ConfigError("there is no optimizer to step: pass the one of create_optimizer() or prepare()")
        self.masters.take_gradients()
        stepped = [self.masters.of(one) for one in self._parameters.values()]
        factor = 1.0 if self.loss_scale is None else 1 / self.loss_scale.scale
        norm = global_norm(stepped) * factor
        applied = math.isfinite(norm)
        if applied:
            if 0 < max_norm < norm + _EPSILON:
                factor *= max_norm / (norm + _EPSILON)
            _scale(stepped, factor)
            let_go(module)
            self.optimizer.step()
            self.masters.give_weights()
        for one in stepped:
            one.grad = None
        if self.loss_scale is not None:
            self.loss_scale.update(overflow=not applied)
        return Step(norm=norm, applied=applied)

    def forget_gradients(self, module: nn.Module) -> None:
        """Clear the gradients, those that are not exchanged yet too."""
        forget_gradients(module)

    # -- Moving averages ----------------------------------------------------------------------------------------------

    def keep_in_fp32(self) -> None:
        """Have masters from now on: a moving average changes by less than 16 bits can show."""
        if not self.masters.pairs:
            self.masters = Masters(self._parameters.values())

    # -- Checkpoints --------------------------------------------------------------------------------------------------

    def write(self, module: nn.Module, folder: Path) -> None:
        """Write weights, and states of the optimizer if there is one. *Collective*."""
        kept = self.kept
        entries = checkpoint.model_entries(module, kept)
        if self.optimizer is not None:
            entries |= checkpoint.optimizer_entries(self.optimizer, {one: name for name, one in kept.items()})
        if self.loss_scale is not None:
            entries[checkpoint.LOSS_SCALE] = torch.tensor(
                [self.loss_scale.scale, self.loss_scale.good_steps], dtype=torch.float64
            )
        checkpoint.save(folder, entries)

    def read(self, module: nn.Module, folder: Path, loading: Loading) -> None:
        """Take up what ``write`` wrote, at any number of ranks. *Collective*.

        Raises:
            CheckpointError: it does not fit.
        """
        let_go(module)
        kept = self.kept
        names: dict[torch.Tensor, str] = {one: name for name, one in kept.items()}
        with Ranks().together("the checkpoint was not loaded"):
            metadata = checkpoint.read_metadata(folder)
            entries = checkpoint.fitting(checkpoint.model_entries(module, kept), metadata, strict=loading.strict)
            if self.optimizer is not None and loading.optimizer:
                entries |= checkpoint.empty_optimizer_entries(metadata, names)
        if self.loss_scale is not None and loading.optimizer and checkpoint.LOSS_SCALE in metadata:
            entries[checkpoint.LOSS_SCALE] = torch.zeros(2, dtype=torch.float64)
        checkpoint.load(folder, entries)
        self.masters.give_weights()
        if self.optimizer is not None and loading.optimizer:
            checkpoint.set_optimizer(self.optimizer, entries, names)
        if self.loss_scale is not None and checkpoint.LOSS_SCALE in entries:
            scale, good_steps = entries[checkpoint.LOSS_SCALE].tolist()
            self.loss_scale.scale, self.loss_scale.good_steps = scale, int(good_steps)

    def check_optimizer(self) -> None:
        """Refuse to load states of an optimizer that is not there: it would begin afresh, unnoticed.

        Raises:
            CheckpointError: there is no optimizer.
        """
        if self.optimizer is None:
            raise CheckpointError(
                "there is no optimizer to load states into: pass optimizer=, or load_optimizer_states=False"
            )

    def _wait(self) -> None:
        if self.mover is not None:
            self.mover.wait()


def _scale(parameters: list[nn.Parameter], factor: float) -> None:
    gradients = [local(one.grad) for one in parameters if one.grad is not None]
    if gradients and factor != 1:
        torch._foreach_mul_(gradients, factor)
