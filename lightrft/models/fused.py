"""The output layer and the log-probs of given tokens in one: all logits never exist at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lightrft.errors import ConfigError
from lightrft.models.log_probs import TokenScores, check_temperature, gradient_of_logits, score_dtype

__all__ = ["fused_linear_log_probs"]

_ELEMENTS_ON_CPU = 1 << 22
_ELEMENTS = 1 << 26
"""Logits that are computed at a time, on a CPU and elsewhere, where that is less than a chunk for all tokens."""


def fused_linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk_size: int = 4096,
    entropy: bool = False,
) -> TokenScores:
    """The log-probs of ``tokens`` under ``softmax((hidden @ weight.T + bias) / temperature)``, with gradient.

    Logits are computed for ``chunk_size`` entries of the vocabulary at a time, in the forward pass and again in the
    backward pass, so that besides the gradients ``tokens * chunk_size`` numbers are held at most (twice with entropy).
    The normalizer is summed up online (Milakov and Gimelshein, arXiv:1805.02867). All products are those of the output
    layer, so the numbers are equal to the plain ones within rounding.

    Args:
        hidden: shape (..., width), the input of the output layer.
        weight: shape (vocabulary, width), its weight.
        tokens: shape (...).
        bias: shape (vocabulary,), or ``None``.
        temperature: what engines divide logits by before they draw.
        chunk_size: entries of the vocabulary.
        entropy: compute the entropy too.

    Returns:
        Tensors of shape (...), in fp32 (of fp64 in fp64). A token outside of the vocabulary has the log-prob NaN.

    Raises:
        ConfigError: shapes do not fit, ``temperature`` is not positive, or ``chunk_size`` is below 1.
    """
    check_temperature(temperature)
    if chunk_size < 1:
        raise ConfigError(f"chunk_size={chunk_size}: expected 1 at least, the entries of the vocabulary in a chunk")
    if hidden.shape[:-1] != tokens.shape or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ConfigError(
            f"got hidden of shape {tuple(hidden.shape)}, weight of shape {tuple(weight.shape)}, tokens of shape "
            f"{tuple(tokens.shape)}: expected (..., width), (vocabulary, width) and (...)"
        )
    rows = hidden.reshape(tokens.numel(), weight.shape[1])
    log_probs, spread = _Fused.apply(  # type: ignore[no-untyped-call]
        rows,
        weight,
        bias,
        tokens.flatten(),
        temperature,
        chunk_size,
        entropy,
    )
    return TokenScores(log_probs.view(tokens.shape), None if spread is None else spread.view(tokens.shape))


class _Fused(torch.autograd.Function):
    """See ``gradient_of_logits`` for the formulas of the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        chunk_size: int,
        entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        blocks = _Blocks(hidden, weight, bias, temperature, chunk_size)
        sums = _Sums(tokens, blocks.dtype, entropy=entropy)
        for rows, first, logits in blocks:
            sums.add(rows, first, logits)
        normalizers, spread = sums.normalizers(), sums.entropy()
        ctx.save_for_backward(hidden, weight, bias, tokens, normalizers, spread)
        ctx.settings = temperature, chunk_size
        return sums.chosen - normalizers, spread

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, normalizers, spread = ctx.saved_tensors
        temperature, chunk_size = ctx.settings
        of_log_probs = gradients[0] / temperature
        of_entropy = None if spread is None else gradients[1] / temperature
        dtype = normalizers.dtype
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(one, dtype=dtype) if needed else None
            for one, needed in zip((hidden, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        for rows, first, logits in _Blocks(hidden, weight, bias, temperature, chunk_size):
            chunk = slice(first, first + logits.shape[1])
            inner = gradient_of_logits(
                logits.sub_(normalizers[rows, None]),
                of_log_probs[rows],
                None if of_entropy is None else (of_entropy[rows], spread[rows]),
            )
            mine = ((tokens[rows] >= chunk.start) & (tokens[rows] < chunk.stop)).nonzero().squeeze(1)
            inner[mine, tokens[rows][mine] - first] += of_log_probs[rows][mine]
            if of_bias is not None:
                of_bias[chunk] += inner.sum(0)
            inner = inner.to(hidden.dtype)
            if of_hidden is not None:
                _add_product(of_hidden[rows], inner, weight[chunk].to(hidden.dtype))
            if of_weight is not None:
                _add_product(of_weight[chunk], inner.T, hidden[rows])
        found = zip((of_hidden, of_weight, of_bias), (hidden, weight, bias), strict=True)
        return *(None if one is None else one.to(like.dtype) for one, like in found), None, None, None, None


class _Sums:
    """What is kept of logits that come chunk by chunk, one number of each kind for each token.

    Attributes:
        chosen: the token's own logit; NaN until it has come.
    """

    def __init__(self, tokens: Tensor, dtype: torch.dtype, *, entropy: bool) -> None:
        self._tokens = tokens
        self._peak = torch.full(tokens.shape, torch.finfo(dtype).min, dtype=dtype, device=tokens.device)
        self._total = torch.zeros_like(self._peak)  # of exp(logit - peak)
        self._weighted = torch.zeros_like(self._peak) if entropy else None  # of that times (logit - peak)
        self.chosen = torch.full_like(self._peak, math.nan)

    def add(self, rows: slice, first: int, logits: Tensor) -> None:
        """Take in the logits of some tokens for vocabulary entries from ``first`` on; they are overwritten."""
        places = self._tokens[rows] - first
        inside = (places >= 0) & (places < logits.shape[1])
        picked = logits.gather(1, places.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        self.chosen[rows] = torch.where(inside, picked, self.chosen[rows])
        peak = torch.maximum(self._peak[rows], logits.amax(1))
        logits.sub_(peak[:, None])
        shift = self._peak[rows] - peak
        shrunk = shift.exp()
        if self._weighted is None:
            total = logits.exp_().sum(1)
        else:
            weights = logits.exp()
            total = weights.sum(1)
            before = shrunk * (self._weighted[rows] + shift * self._total[rows])
            self._weighted[rows] = before + weights.mul_(logits.clamp_(min=torch.finfo(logits.dtype).min)).sum(1)
        self._total[rows] = shrunk * self._total[rows] + total
        self._peak[rows] = peak

    def normalizers(self) -> Tensor:
        """The logarithm of the sum of exponentials."""
        return self._peak + self._total.log()

    def entropy(self) -> Tensor | None:
        """That of the distributions; ``None`` if it is not summed up."""
        return None if self._weighted is None else self._total.log() - self._weighted / self._total


class _Blocks:
    """Logits over the temperature, block by block, in memory that the next block overwrites.

    A block has a chunk of the vocabulary for as many tokens as fit into a processor's cache, or keep a GPU busy.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, chunk_size: int
    ) -> None:
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._temperature = temperature
        self._width = min(chunk_size, weight.shape[0])
        elements = _ELEMENTS_ON_CPU if hidden.device.type == "cpu" else _ELEMENTS
        self._rows = max(1, min(elements // self._width, hidden.shape[0]))
        self.dtype = score_dtype(hidden.dtype)

    def __iter__(self) -> Iterator[tuple[slice, int, Tensor]]:
        """Which tokens, the first entry of the vocabulary, and logits of shape (tokens, entries)."""
        hidden = self._hidden
        memory = torch.empty(self._rows * self._width, dtype=hidden.dtype, device=hidden.device)
        for first in range(0, self._weight.shape[0], self._width):
            chunk = slice(first, first + self._width)
            weight = self._weight[chunk].to(hidden.dtype).T
            bias = None if self._bias is None else self._bias[chunk].to(hidden.dtype)
            for begin in range(0, hidden.shape[0], self._rows):
                rows = slice(begin, begin + self._rows)
                some = hidden[rows]
                logits = memory[: some.shape[0] * weight.shape[1]].view(some.shape[0], weight.shape[1])
                if bias is None:
                    torch.mm(some, weight, out=logits)
                else:
                    torch.addmm(bias, some, weight, out=logits)
                found = logits.to(self.dtype)
                yield rows, first, found if self._temperature == 1 else found.div_(self._temperature)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
