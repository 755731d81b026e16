"""Exponential moving averages of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightrft.errors import ConfigError

__all__ = ["FineAverages", "check_alike", "check_beta", "copy_buffers", "update"]

Named = Iterable[tuple[str, Tensor]]


def update(parameters: Named, averages: Named, beta: float, device: torch.device | str = "cpu") -> None:
    """Move every average towards its parameter, in place: ``average = beta * average + (1 - beta) * parameter``.

    The formula is that of the teacher's weights in Tarvainen and Valpola, *Mean teachers are better role models*
    (NeurIPS 2017), section 2. It is computed in float32, or in float64 if either is float64.

    Both may be whole tensors or DTensors. Shards of equal placement are averaged where they lie; otherwise the
    parameter is gathered first, which is a collective, so that every rank calls this.

    Args:
        parameters: names and tensors of the model.
        averages: names and tensors of the averaged model, in any order, of any floating dtype and on any device.
        beta: from 0 (the average becomes the parameter) to 1 (it stays).
        device: where the arithmetic is done.

    Raises:
        ConfigError: ``beta`` is out of range, or names or shapes differ.
    """
    check_beta(beta)
    with torch.no_grad():
        for source, average in _pairs(parameters, averages):
            dtype = torch.promote_types(torch.promote_types(source.dtype, average.dtype), torch.float32)
            moved = average.to(device, dtype, copy=True).mul_(beta).add_(source.to(device, dtype), alpha=1 - beta)
            average.copy_(moved)


def check_beta(beta: float) -> None:
    """Refuse a ``beta`` that is not from 0 to 1.

    Raises:
        ConfigError: it is not.
    """
    if not 0 <= beta <= 1:
        raise ConfigError(f"beta={beta!r}: expected a number from 0 to 1")


class FineAverages:
    """Averages of weights that are kept in 16 bits, which cannot show the small steps of an average: each in fp32.

    They live as long as the weights do. What is written into a weight between two updates, by loading a checkpoint for
    example, counts: its average goes on from there.
    """

    def __init__(self) -> None:
        self._fine = WeakTensorKeyDictionary()

    def update(self, parameters: Named, averages: Named, beta: float, device: torch.device | str = "cpu") -> None:
        """As the function ``update``; averages of 16 bits get what is kept of them in fp32, rounded.

        Args:
            parameters: as there.
            averages: as there, the same objects each time; none is a DTensor.
            beta: as there.
            device: where the arithmetic is done, and what is kept in fp32 lies.

        Raises:
            ConfigError: as there.
        """
        rounded = dict(averages)
        with torch.no_grad():
            fine = {name: self._of(average, device) for name, average in rounded.items()}
            update(parameters, fine.items(), beta, device)
            for name, average in rounded.items():
                if fine[name] is not average:
                    average.copy_(fine[name])

    def _of(self, average: Tensor, device: torch.device | str) -> Tensor:
        """What stands for ``average``: itself, or where it has 16 bits, its elements in fp32."""
        if average.dtype not in {torch.bfloat16, torch.float16}:
            return average
        fine, now = self._fine.get(average), average.detach().to(device)
        fine = now.float() if fine is None or fine.shape != now.shape else fine.to(now.device)
        fine.copy_(torch.where(fine.to(now.dtype) == now, fine, now.float()))
        self._fine[average] = fine
        return fine


def copy_buffers(buffers: Named, targets: Named) -> None:
    """Make every buffer of the averaged model equal to the model's: running statistics are averages already.

    Raises:
        ConfigError: names or shapes differ.
    """
    with torch.no_grad():
        for source, target in _pairs(buffers, targets):
            target.copy_(source)


def _pairs(sources: Named, targets: Named) -> Iterator[tuple[Tensor, Tensor]]:
    """Source and target by name, as plain tensors of equal shape; the target shares memory with what was given.

    One pair at a time, so that no more than one parameter is whole at once.
    """
    source_of, target_of = dict(sources), dict(targets)
    check_alike(_shapes(source_of), _shapes(target_of))
    for name, source in source_of.items():
        yield _laid_out_as(target_of[name], source), _local(target_of[name])


def _shapes(named: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in named.items()}


def check_alike(source_of: Mapping[str, torch.Size], target_of: Mapping[str, torch.Size]) -> None:
    """A model and the averaged one have the same names, with the same shapes.

    Raises:
        ConfigError: they do not.
    """
    if source_of.keys() != target_of.keys():
        missing = sorted(source_of.keys() - target_of.keys())
        unknown = sorted(target_of.keys() - source_of.keys())
        raise ConfigError(
            f"the averaged model lacks {missing} and has {unknown} in addition: expected the names of the model"
        )
    for name, shape in source_of.items():
        if shape != target_of[name]:
            raise ConfigError(
                f"{name} has shape {tuple(target_of[name])} in the averaged model and {tuple(shape)} in the model: "
                "expected equal shapes"
            )


def _laid_out_as(target: Tensor, source: Tensor) -> Tensor:
    """The part of ``source`` that belongs to this rank's part of ``target``."""
    if isinstance(source, DTensor):
        if isinstance(target, DTensor) and _layout(source) == _layout(target):
            return source._local_tensor
        source = source.full_tensor()
    if isinstance(target, DTensor):  # without a source rank nothing is sent: every rank has the whole
        return _local(distribute_tensor(source, target.device_mesh, target.placements, src_data_rank=None))
    return source


def _layout(tensor: DTensor) -> tuple[object, object]:
    return tensor.device_mesh, tensor.placements


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor
