"""Moving averages of weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightrft.strategy.deepspeed import masters
from lightrft.strategy.deepspeed.parameters import gathered, is_partitioned, own_part, own_partition, shape_of
from lightrft.strategy.utils import moving_average

if TYPE_CHECKING:
    import torch

    from lightrft.strategy.deepspeed.pieces import Piece

__all__ = ["move_towards"]


def move_towards(
    source: torch.nn.Module,
    target: torch.nn.Module,
    *,
    fine: moving_average.FineAverages,
    engine: Any,
    beta: float,
    device: torch.device,
) -> None:
    """Make the weights of ``target`` ``beta * target + (1 - beta) * source``, and its buffers those. *Collective*.

    An average is kept in fp32: of what is trained, as the engine's masters; of other weights in 16 bits, in ``fine``,
    and there each rank has as much of it as it has of the weight.

    Args:
        source: partitioned or not.
        target: partitioned, or whole on each rank, of the same parameters.
        fine: of the strategy.
        engine: around ``target``, if that is trained; else ``None``.
        beta: from 0 to 1.
        device: where the average of a weight is computed and kept that is whole on each rank and not trained.

    Raises:
        ConfigError: the parameters differ, or ``beta`` is out of range.
    """
    moving_average.check_beta(beta)
    parameters, averages = dict(source.named_parameters()), dict(target.named_parameters())
    moving_average.check_alike(*({n: shape_of(p) for n, p in each.items()} for each in (parameters, averages)))
    trained = set() if engine is None else masters.trained_names(engine)
    pieces = list(masters.pieces_of(engine)) if trained else []
    if trained:
        masters.free_weights(engine)
    for name, parameter in parameters.items():
        with gathered([parameter]):
            if name in trained:
                mine = [piece for piece in pieces if piece.name == name]
                _move_masters(parameter.data, masters.flat_masters(engine), mine, beta)
            elif is_partitioned(averages[name]):
                part = own_partition(averages[name])
                fine.update([(name, own_part(averages[name], parameter.data))], [(name, part)], beta, part.device)
            else:
                fine.update([(name, parameter.data)], [(name, averages[name])], beta, device)
    if trained:
        masters.give_weights(engine)
    moving_average.copy_buffers(source.named_buffers(), target.named_buffers())


def _move_masters(whole: torch.Tensor, flats: list[torch.Tensor], pieces: list[Piece], beta: float) -> None:
    """Average what this rank has of the masters of one parameter."""
    for piece in pieces:
        flat = flats[piece.flat].detach()
        average = flat[piece.offset : piece.offset + piece.length]
        own = whole.view(-1)[piece.start : piece.start + piece.length]
        moving_average.update([(piece.name, own)], [(piece.name, average)], beta, flat.device)
