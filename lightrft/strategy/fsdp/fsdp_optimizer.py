"""Optimizers over sharded parameters: which parameters they step, fp32 masters, and where their states are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from lightrft.errors import ConfigError
from lightrft.strategy.fsdp.fsdp_utils import local

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Masters", "StateMover", "point", "release"]


def release(optimizer: Optimizer, model: nn.Module) -> list[list[str]]:
    """Take the parameters out of the groups of ``optimizer``; their names, group by group.

    Between ``release`` and ``point`` the optimizer keeps no parameter alive.

    Raises:
        ConfigError: it has stepped already, or it steps what is not in ``model``.
    """
    if optimizer.state:
        raise ConfigError(
            f"{type(optimizer).__name__} has states already, of parameters that are about to be sharded: prepare it "
            "before its first step, and restore states with load_ckpt"
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    strangers = [one for group in optimizer.param_groups for one in group["params"] if one not in names]
    if strangers:
        shapes = ", ".join(str(tuple(one.shape)) for one in strangers[:3])
        raise ConfigError(
            f"{type(optimizer).__name__} steps {len(strangers)} parameters (shapes {shapes}) that are not in "
            f"{type(model).__name__}: prepare each model together with its own optimizer"
        )
    groups = [[names[one] for one in group["params"]] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"] = []
    return groups


def point(optimizer: Optimizer, groups: Iterable[Iterable[str]], parameters: Mapping[str, nn.Parameter]) -> None:
    """Let ``optimizer`` step ``parameters``, by the names that ``release`` gave."""
    for group, names in zip(optimizer.param_groups, groups, strict=True):
        group["params"] = [parameters[name] for name in names]


class Masters:
    """An fp32 copy of each parameter that is kept in 16 bits: what the optimizer steps in its place.

    Args:
        parameters: all parameters of a model.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.pairs = {
            one: nn.Parameter(one.detach().float(), requires_grad=one.requires_grad)
            for one in parameters
            if one.dtype in {torch.bfloat16, torch.float16}
        }

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """What stands for ``parameter``: its master, or itself if it has none."""
        return self.pairs.get(parameter, parameter)

    def adopt(self, optimizer: Optimizer) -> None:
        """Let ``optimizer`` step the masters.

        Raises:
            ConfigError: it has stepped the parameters themselves already.
        """
        for group in optimizer.param_groups:
            if any(one in optimizer.state and one in self.pairs for one in group["params"]):
                raise ConfigError(
                    f"{type(optimizer).__name__} has stepped 16-bit parameters: with use_mp_opt it steps fp32 masters "
                    "from the first step on; use the optimizer of create_optimizer or prepare"
                )
            group["params"] = [self.of(one) for one in group["params"]]

    def take_gradients(self) -> None:
        """Move the gradients of the parameters to their masters; a parameter without one leaves its master without."""
        for parameter, master in self.pairs.items():
            master.grad = None if parameter.grad is None else parameter.grad.to(master)
            parameter.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the masters into the parameters."""
        if self.pairs:
            torch._foreach_copy_([local(one) for one in self.pairs], [local(one) for one in self.pairs.values()])

    @torch.no_grad()
    def take_weights(self) -> None:
        """Take the values of the parameters."""
        for parameter, master in self.pairs.items():
            master.copy_(parameter)


class StateMover:
    """Moves the states of one optimizer, and the masters that it steps, between a device and the CPU.

    On CUDA copies go through pinned memory on a stream of their own, so that the next computation does not wait for
    them. Whoever reads states that were moved to the CPU calls ``wait`` first.

    Args:
        optimizer: whose states.
        masters: the masters it steps.
        device: of this rank.
    """

    def __init__(self, optimizer: Optimizer, masters: Masters, device: torch.device) -> None:
        self._optimizer = optimizer
        self._masters = masters
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def move(self, device: torch.device) -> None:
        """Begin to move everything to ``device``: that of this rank, or the CPU."""
        if self._device.type != "cuda":
            self._replace(lambda tensor: tensor.to(device))
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        stream, present = self._stream, torch.cuda.current_stream(self._device)
        stream.wait_stream(present)
        self._replace(lambda tensor: _copied(tensor, device, stream))
        if device.type == "cuda":
            present.wait_stream(stream)

    def wait(self) -> None:
        """Until what was moved is there."""
        if self._stream is not None:
            self._stream.synchronize()

    def _replace(self, moved: Any) -> None:
        for state in self._optimizer.state.values():
            for key, value in state.items():
                if _is_moved(value):
                    state[key] = _with_local(value, moved(local(value)))
        for master in self._masters.pairs.values():
            new = nn.Parameter(_with_local(master.detach(), moved(local(master.detach()))), master.requires_grad)
            torch.utils.swap_tensors(master, new)


def _is_moved(value: object) -> bool:
    """Whether a state is worth moving: step counts stay where the optimizer wants them."""
    return isinstance(value, torch.Tensor) and value.dim() > 0


def _with_local(tensor: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """``part`` in the place of this rank's part of ``tensor``."""
    if not isinstance(tensor, DTensor):
        return part
    return DTensor.from_local(
        part, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.size(), stride=tensor.stride()
    )


def _copied(tensor: torch.Tensor, device: torch.device, stream: torch.cuda.Stream) -> torch.Tensor:
    """A copy, begun on ``stream``; ``tensor`` keeps its memory until it is done.

    The copy is allocated on the present stream, which uses it and to which its memory returns; ``stream`` waits for all
    that the present one has begun before.
    """
    leaves = device.type == "cpu"
    there = torch.empty_like(tensor, device=device, pin_memory=leaves)
    with torch.cuda.stream(stream):
        there.copy_(tensor, non_blocking=True)
    if leaves:
        tensor.record_stream(stream)
    return there
