"""The trainable parameters of a model in one flat buffer, of which each rank optimizes its part.

This is how ZeRO and FSDP share the work of an optimizer step, without what makes them complicated: every rank keeps all
weights, so that forward and backward need no communication.

``weights`` (what the model computes with) has ``world_size`` equal parts. The optimizer of rank *r* sees ``pieces``:
what of each parameter lies in part *r*. One step is an all-reduce of the gradient, the optimizer on the pieces, and an
all-gather of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from lightrft.errors import CollectiveMismatchError

__all__ = ["FlatParameters", "Piece"]

# torch 2.13 gave it a new name
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What of one parameter this rank optimizes.

    Attributes:
        name: of the parameter.
        parameter: of the model, whole.
        first: where the piece begins in the flattened parameter.
        master: the piece, in the precision of the optimizer; empty if none of the parameter is this rank's.
    """

    name: str
    parameter: nn.Parameter
    first: int
    master: nn.Parameter

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The elements of ``whole``, which has the shape of the parameter, that are this piece's; a view of it."""
        return whole.reshape(-1)[self.first : self.first + self.master.numel()]


class FlatParameters:
    """Trainable parameters of ``model``, all of one dtype.

    Args:
        named: the parameters by name; none twice.
        rank: of this process.
        world_size: of the default process group.
        deepspeed: as with DeepSpeed, rank 0's weights count at the start, the optimizer has weights of its own even
            where the precision is the same (what is written into the model's weights is then undone by the next step),
            and parameters that the loss does not reach are stepped with a gradient of zero. Else, as with FSDP, every
            rank's own part counts at the start, and parameters that are not reached are left out.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        rank: int,
        world_size: int,
        deepspeed: bool,
    ) -> None:
        self._world_size = world_size
        self._parameters = dict(named)
        sizes = [parameter.numel() for parameter in named.values()]
        self._total = sum(sizes)
        self._part = -(-self._total // world_size)
        self._first = rank * self._part
        any_parameter = next(iter(named.values()))
        self.weights = any_parameter.detach().new_zeros(self._part * world_size)
        self._adopt()
        if world_size > 1 and deepspeed:
            dist.broadcast(self.weights, 0)
        elif world_size > 1:
            self._gather()
        shares = self.weights.dtype == torch.float32 and not deepspeed
        self.masters = self._own if shares else self._own.float().clone()
        self.pieces = self._cut()
        self._owned = [piece for piece in self.pieces if piece.master.numel()]
        self._gradient = self.masters
        self._steps_unreached = deepspeed
        self._padding = self.weights.new_zeros(self._part * world_size - self._total)
        self._reached = self.weights.new_ones(len(named))
        self._by_all = [float(world_size)] * len(named)

    @property
    def _own(self) -> torch.Tensor:
        return self.weights[self._first : self._first + self._part]

    def _adopt(self) -> None:
        """Move the parameters into the flat buffer: they become views of it."""
        offset = 0
        for parameter in self._parameters.values():
            view = self.weights[offset : offset + parameter.numel()].view(parameter.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            offset += parameter.numel()

    def _cut(self) -> list[Piece]:
        pieces, offset = [], 0
        for name, parameter in self._parameters.items():
            first = min(max(self._first, offset), offset + parameter.numel())
            last = max(min(self._first + self._part, offset + parameter.numel()), first)
            own = slice(first - self._first, last - self._first) if last > first else slice(0, 0)
            master = nn.Parameter(self.masters[own], requires_grad=True)
            pieces.append(Piece(name=name, parameter=parameter, first=first - offset, master=master))
            offset += parameter.numel()
        return pieces

    def reduce_gradients(self, divisor: float) -> torch.Tensor:
        """Give each piece its gradient: the sum over all ranks divided by ``divisor``, in float32. *Collective*.

        Returns:
            The sum of squares of the whole gradient.

        Raises:
            CollectiveMismatchError: the loss of some ranks reaches a parameter, and that of others does not. FSDP and
                ZeRO exchange buffers of other sizes then.
        """
        flat = self._whole_gradient()
        if self._world_size > 1:
            dist.all_reduce(flat)
            self._check_reached(flat[-len(self._by_all) :].tolist())
        flat = flat[: len(self.weights)]
        if divisor != 1:
            flat.div_(divisor)
        self._gradient = flat[self._first : self._first + self._part]
        offset = 0
        for piece in self._owned:
            length = piece.master.numel()
            if self._steps_unreached or piece.parameter.grad is not None:
                piece.master.grad = self._gradient[offset : offset + length]
            offset += length
        return flat.square().sum()

    def _whole_gradient(self) -> torch.Tensor:
        """In float32, as long as ``weights``; behind it, for each parameter, 1 if the loss reaches it."""
        gradients = [parameter.grad for parameter in self._parameters.values()]
        flat = [
            parameter.new_zeros(parameter.numel()) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(self._parameters.values(), gradients, strict=True)
        ]
        unreached = [gradient is None for gradient in gradients]
        reached = self._reached.masked_fill(torch.tensor(unreached), 0) if any(unreached) else self._reached
        return torch.cat([*flat, self._padding, reached]).float()

    def _check_reached(self, counts: list[float]) -> None:
        """By how many ranks each parameter was reached: by all of them or by none."""
        if counts == self._by_all:
            return
        some = [name for name, count in zip(self._parameters, counts, strict=True) if 0 < count < self._world_size]
        if some:
            raise CollectiveMismatchError(
                f"the loss of some ranks does not reach {', '.join(some[:5])}, and that of others does: ZeRO and FSDP "
                "fail, or wait for ever, since their ranks exchange gradients of other sizes. Let every loss reach the "
                "same parameters, by adding 0 * their output for example"
            )

    def scale_gradients(self, factor: float) -> None:
        """Multiply the gradient of this rank's part."""
        self._gradient.mul_(factor)

    def publish(self) -> None:
        """Let every rank's weights be what the optimizers of all ranks made of them. *Collective*."""
        with torch.no_grad():
            if self.masters.data_ptr() != self._own.data_ptr():
                self._own.copy_(self.masters)
            if self._world_size > 1:
                self._gather()

    def _gather(self) -> None:
        all_gather_single(self.weights, self._own.clone())

    def adopt_weights(self) -> None:
        """Let the optimizer go on from the weights that the model has now, as after loading them."""
        with torch.no_grad():
            self.masters.copy_(self._own)

    def clear(self) -> None:
        """Forget all gradients."""
        for piece in self.pieces:
            piece.parameter.grad = None
        for piece in self._owned:
            piece.master.grad = None

    def move(self, device: torch.device) -> None:
        """Move weights and masters; parameters and pieces stay the same objects."""
        shares = self.masters.data_ptr() == self._own.data_ptr()
        self.weights = self.weights.to(device)
        self.masters = self._own if shares else self.masters.to(device)
        offset = own = 0
        for piece in self.pieces:
            length = piece.parameter.numel()
            piece.parameter.data = self.weights[offset : offset + length].view(piece.parameter.shape)
            piece.master.data = self.masters[own : own + piece.master.numel()]
            offset, own = offset + length, own + piece.master.numel()


def repoint(groups: Iterable[dict[str, object]], pieces: Iterable[Piece]) -> None:
    """Let parameter groups of an optimizer hold the pieces of the parameters that they held, without empty ones."""
    masters = {piece.parameter: piece.master for piece in pieces}
    for group in groups:
        held = [masters.get(parameter, parameter) for parameter in group["params"]]  # type: ignore[attr-defined]
        group["params"] = [parameter for parameter in held if parameter.numel()]
