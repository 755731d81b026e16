"""Log-probs of given tokens and entropy of their distributions, without copies of the softmax."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightrft.errors import ConfigError

__all__ = ["TokenScores", "bias_of", "check_temperature", "gradient_of_logits", "score_dtype", "token_log_probs"]

_ELEMENTS = 1 << 21
"""Logits that are computed with at a time."""


class TokenScores(NamedTuple):
    """What a model says of tokens.

    A tuple, since that is what FSDP2 and DeepSpeed look into for tensors with a gradient.

    Attributes:
        log_probs: of each token, in fp32 (of fp64 logits in fp64).
        entropy: of the distribution that each token was drawn from, in nats; ``None`` if it was not asked for.
    """

    log_probs: Tensor
    entropy: Tensor | None = None


def token_log_probs(
    logits: Tensor, tokens: Tensor, *, bias: Tensor | None = None, temperature: float = 1.0, entropy: bool = False
) -> TokenScores:
    """The log-probs of ``tokens`` under ``softmax((logits + bias) / temperature)``, with gradient for the logits.

    Beside the logits, and their gradient in the backward pass, only a few rows are held at a time.

    Args:
        logits: shape (..., vocabulary), of any floating-point dtype; computed with in fp32 at least.
        tokens: shape (...).
        bias: shape (vocabulary,), constant; what engines add to logits before they draw, or ``None``.
        temperature: what engines divide logits by before they draw.
        entropy: compute the entropy too.

    Returns:
        Tensors of shape (...).

    Raises:
        ConfigError: shapes do not fit, or ``temperature`` is not positive.
    """
    check_temperature(temperature)
    if logits.shape[:-1] != tokens.shape:
        raise ConfigError(
            f"got logits of shape {tuple(logits.shape)} for tokens of shape {tuple(tokens.shape)}: expected one row of "
            "logits for each token"
        )
    rows = logits.reshape(tokens.numel(), logits.shape[-1])
    log_probs, spread = _Scores.apply(rows, tokens.flatten(), bias, temperature, entropy)  # type: ignore[no-untyped-call]
    return TokenScores(log_probs.view(tokens.shape), None if spread is None else spread.view(tokens.shape))


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that logits cannot be divided by.

    Raises:
        ConfigError: it is not a positive number.
    """
    if not 0 < temperature < math.inf:
        raise ConfigError(
            f"temperature={temperature!r}: expected a positive number, that with which tokens were drawn; for tokens "
            "of greedy decoding pass 1.0"
        )


def bias_of(logit_bias: Mapping[int, float], vocabulary: int, device: torch.device) -> Tensor:
    """What is added to the logit of each token, shape (vocabulary,), fp32.

    Args:
        logit_bias: that of some tokens, as in ``SamplingParams``; the others have 0.
        vocabulary: number of tokens.
        device: of the result.

    Raises:
        ConfigError: a token is outside of the vocabulary.
    """
    if outside := [token for token in logit_bias if not 0 <= token < vocabulary]:
        raise ConfigError(f"logit_bias of the tokens {outside}: expected token ids from 0 to {vocabulary - 1}")
    found = torch.zeros(vocabulary, device=device)
    found[list(logit_bias)] = torch.tensor(list(logit_bias.values()), device=device)
    return found


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """What log-probs of logits in ``dtype`` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Scores(torch.autograd.Function):
    """The gradient of ``log p(token)`` is ``onehot(token) - p``; that of the entropy H is ``-p * (log p + H)``."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, bias: Tensor | None, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        dtype = score_dtype(logits.dtype)
        normalizers = torch.empty(tokens.shape, dtype=dtype, device=logits.device)
        log_probs = torch.empty_like(normalizers)
        spread = torch.empty_like(normalizers) if entropy else None
        for rows in _blocks(*logits.shape):
            part = logits[rows].to(dtype) if bias is None else logits[rows].to(dtype) + bias
            part = part if temperature == 1 else part / temperature
            normalizers[rows] = part.logsumexp(-1)
            log_probs[rows] = part.gather(-1, tokens[rows, None]).squeeze(-1) - normalizers[rows]
            if spread is not None:
                logs = part - normalizers[rows, None]
                spread[rows] = -_expected(logs.exp(), logs)
        ctx.save_for_backward(logits, tokens, bias, normalizers, spread)
        ctx.temperature = temperature
        return log_probs, spread

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None]:
        logits, tokens, bias, normalizers, spread = ctx.saved_tensors
        of_log_probs, of_entropy = gradients
        found = torch.empty_like(logits)
        for rows in _blocks(*logits.shape):
            logs = logits[rows].to(normalizers.dtype, copy=True)
            logs = logs if bias is None else logs.add_(bias)
            logs = logs.div_(ctx.temperature).sub_(normalizers[rows, None])
            inside = gradient_of_logits(
                logs, of_log_probs[rows], None if spread is None else (of_entropy[rows], spread[rows])
            )
            inside.scatter_add_(-1, tokens[rows, None], of_log_probs[rows, None])
            found[rows] = inside.div_(ctx.temperature)
        return found, None, None, None, None


def gradient_of_logits(logs: Tensor, of_log_probs: Tensor, entropy: tuple[Tensor, Tensor] | None) -> Tensor:
    """The gradient with respect to the logits that ``logs`` are the log-probs of, without that of the token itself.

    Args:
        logs: shape (rows, vocabulary); overwritten.
        of_log_probs: shape (rows,), the gradient with respect to the token's log-prob.
        entropy: that with respect to the entropy, and the entropy; ``None`` for none.
    """
    if entropy is None:
        return logs.exp_().mul_(-of_log_probs[:, None])
    of_entropy, spread = entropy
    probs = logs.exp()
    factor = logs.clamp_(min=torch.finfo(logs.dtype).min).add_(spread[:, None]).mul_(of_entropy[:, None])
    return probs.mul_(factor.add_(of_log_probs[:, None]).neg_())


def _expected(probs: Tensor, values: Tensor) -> Tensor:
    """The mean of ``values`` under ``probs``, of which those of probability 0 may be infinite."""
    return (probs * values.clamp(min=torch.finfo(values.dtype).min)).sum(-1)


def _blocks(rows: int, width: int) -> Iterator[slice]:
    """Rows in blocks of at most ``_ELEMENTS`` elements, or of one row."""
    step = max(1, _ELEMENTS // max(1, width))
    return (slice(first, first + step) for first in range(0, rows, step))
