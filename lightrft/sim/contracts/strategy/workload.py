"""A tiny transformer, its data, a program that trains it through a strategy, and the plain training that it equals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from lightrft.strategy.strategy_base import StrategyBase

__all__ = [
    "BATCH",
    "Recipe",
    "Told",
    "Transformer",
    "close",
    "micro_batches",
    "plain",
    "train",
    "transformer",
    "weights",
]

VOCABULARY, WIDTH, HEADS, LENGTH = 24, 16, 2, 8
BATCH = 32
"""Sequences of one optimizer step, over all ranks."""


class Block(nn.Module):
    """One layer of ``Transformer``: what FSDP wraps by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inputs = nn.Linear(WIDTH, 3 * WIDTH, bias=False)  # a bias of keys has no gradient but rounding
        self.outputs = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """From and to a tensor of shape (batch, length, width)."""
        batch, length, _ = x.shape
        q, k, v = self.inputs(self.norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        gelu = functional.gelu(attended.transpose(1, 2).reshape(batch, length, -1))
        found: Tensor = x + self.outputs(gelu)
        return found


class Transformer(nn.Module):
    """Token ids of shape (batch, length) to logits of shape (batch, length, vocabulary).

    Args:
        tied: whether the output layer has the weights of the embedding.
    """

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Logits of the next token at each place."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def transformer(seed: int = 0, *, tied: bool = False) -> Transformer:
    """The same weights on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(tied=tied)


def batch(step: int, size: int = BATCH) -> Tensor:
    """Token ids of shape (size, length): all sequences of one optimizer step."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(VOCABULARY, (size, LENGTH), generator=generator)


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy of the next token, mean over all but the last place."""
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def micro_batches(strategy: StrategyBase, step: int, size: int = BATCH) -> Iterator[Tensor]:
    """The micro-batches of this rank: shapes (micro_train_batch_size, length)."""
    mine = batch(step, size).chunk(strategy.groups.dp_size)[strategy.groups.dp_rank]
    yield from mine.to(strategy.device).split(strategy.config.micro_train_batch_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        optimizer: makes it of parameters.
        max_norm: gradients are clipped to it; 0 means never.
        steps: optimizer steps.
        tied: whether embedding and output layer are one.
        decay: what the learning rate is multiplied by after each step.
        seed: of the weights.
    """

    optimizer: str = "sgd"
    max_norm: float = 0.0
    steps: int = 3
    tied: bool = False
    decay: float = 1.0
    seed: int = 0

    def model(self) -> Transformer:
        """The model, the same on every rank."""
        return transformer(self.seed, tied=self.tied)

    def make(self, parameters: Any) -> torch.optim.Optimizer:
        """The optimizer."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=0.1)
        return torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR | None:
        """The schedule of ``optimizer``; none if its learning rate stays."""
        if self.decay == 1:
            return None
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.decay**step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What came of training.

    Attributes:
        losses: of each step, mean over all sequences.
        norms: of the gradient of each step, before clipping.
        weights: by name, whole.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


@functools.cache
def plain(recipe: Recipe, size: int = BATCH) -> Told:
    """Training in one process, with the whole batch at once."""
    with torch.random.fork_rng(devices=[]):
        model = recipe.model()
        optimizer = recipe.make(model.parameters())
        scheduler = recipe.schedule(optimizer)
        losses, norms = [], []
        for step in range(recipe.steps):
            ids = batch(step, size)
            loss = loss_of(model(ids), ids)
            loss.backward()
            largest = recipe.max_norm or float("inf")
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), largest)))
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Told(losses=losses, norms=norms, weights=found)


def train(strategy: StrategyBase, recipe: Recipe) -> Told:
    """The same through ``strategy``, whose batch size is ``BATCH``."""
    model = recipe.model()
    optimizer = recipe.make(model.parameters())
    model, optimizer, scheduler = strategy.prepare((model, optimizer, recipe.schedule(optimizer)))
    losses, norms = [], []
    for step in range(recipe.steps):
        total, norm = 0.0, None
        for ids in micro_batches(strategy, step):
            loss = loss_of(model(ids), ids)
            strategy.backward(loss, model, optimizer)
            norm = strategy.optimizer_step(optimizer, model, scheduler)
            total += loss.item()
        if norm is None:
            raise AssertionError("no optimizer step after all micro-batches of a step")
        losses.append(strategy.all_reduce(total / strategy.accumulated_gradient))
        norms.append(norm)
    return Told(losses=losses, norms=norms, weights=weights(strategy, model))


def weights(strategy: StrategyBase, model: nn.Module) -> dict[str, Tensor]:
    """The whole weights, in float32 on the CPU."""
    full: Callable[[nn.Module], Iterator[tuple[str, Tensor]]] = strategy.full_parameters
    return {name: tensor.detach().float().cpu().clone() for name, tensor in full(model)}


def close(found: Told, expected: Told, *, what: str) -> None:
    """Weights within 5e-5, gradient norms within 1e-5 relative, losses within 1e-5.

    Raises:
        AssertionError: they are not.
    """
    for step, (one, other) in enumerate(zip(found.losses, expected.losses, strict=True)):
        if not abs(one - other) <= 1e-5:
            raise AssertionError(f"{what}: the loss of step {step} is {one!r}, and {other!r} in one plain process")
    for step, (one, other) in enumerate(zip(found.norms, expected.norms, strict=True)):
        if not abs(one - other) <= 1e-5 * abs(other):
            raise AssertionError(f"{what}: the norm of step {step} is {one!r}, and {other!r} in one plain process")
    same(found.weights, expected.weights, what=what)


def same(found: dict[str, Tensor], expected: dict[str, Tensor], *, what: str, within: float = 5e-5) -> None:
    """Two sets of weights have the same names, and differ by ``within`` at most.

    Raises:
        AssertionError: they do not.
    """
    if found.keys() != expected.keys():
        raise AssertionError(f"{what}: expected weights {sorted(expected)}, got {sorted(found)}")
    for name, value in expected.items():
        worst = float((found[name] - value).abs().max())
        if not worst <= within:
            raise AssertionError(f"{what}: {name} differs by {worst}")
