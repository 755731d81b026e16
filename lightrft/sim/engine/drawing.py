"""Logits to tokens: penalties, temperature, top-k, top-p, min-p, and the draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lightrft.sim.engine.numbers import mixed, uniform

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightrft.sim.engine.samples import Sample
    from lightrft.strategy.sampling import SamplingParams

__all__ = ["Drawer", "Step"]

_NEVER = float("-inf")

_ROUNDING = 1e-5
"""What rounding changes of a logit in single precision, as a share of the largest: a generous bound."""


@dataclass(frozen=True, slots=True)
class Step:
    """The next token of each sample, and its log-probs: see ``Drawn``. Each is (B,).

    ``close`` is true where logits that differ by rounding might have led to another token.
    """

    tokens: Tensor
    raw: Tensor
    processed: Tensor
    tempered: Tensor
    close: Tensor

    def replaced(self, others: Mapping[int, Step]) -> Step:
        """The same with the only row of each of ``others`` in the place of a row."""
        made = [getattr(self, one.name).clone() for one in fields(self)]
        for row, other in others.items():
            for mine, one in zip(made, fields(self), strict=True):
                mine[row] = getattr(other, one.name)[0]
        return Step(*made)


class Drawer:
    """Draws the next token of each of B samples; what it draws for one depends on that one alone.

    Args:
        samples: B of them.
        ends: token ids that are not drawn before ``min_tokens``: the end of the model, also where it ends nothing, and
            those of the parameters.
    """

    def __init__(self, samples: Sequence[Sample], ends: Sequence[frozenset[int]]) -> None:
        params = [sample.params for sample in samples]
        self._samples = samples
        self._params = params
        self._ends = ends
        self._seeds = np.array([sample.seed % 2**64 for sample in samples], dtype=np.uint64)
        self._greedy = torch.tensor([each.temperature == 0 for each in params])
        self._all_greedy, self._any_greedy = bool(self._greedy.all()), bool(self._greedy.any())
        self._never = torch.zeros(len(samples), dtype=torch.bool)
        self._plain = all(each.temperature in (0, 1) for each in params)
        self._temperature = torch.tensor([each.temperature or 1.0 for each in params], dtype=torch.float64).unsqueeze(1)
        self._cut = any(each.top_k > 0 or each.top_p < 1 or each.min_p > 0 for each in params)
        self._special = [
            row for row, each in enumerate(params) if _penalises(each) or each.logit_bias or each.min_tokens
        ]

    def keep(self, rows: Sequence[int]) -> Drawer:
        """The same for some of the samples, in this order."""
        return Drawer([self._samples[row] for row in rows], [self._ends[row] for row in rows])

    def draw(self, logits: Tensor, drawn: NDArray[np.int64]) -> Step:
        """One step.

        Args:
            logits: (B, V).
            drawn: tokens of each sample so far, (B, T).
        """
        logits = logits.double()
        raw = logits.log_softmax(-1)
        changed = self._changed(logits, drawn)
        if not self._plain:
            changed = changed / self._temperature
        tempered = processed = raw if changed is logits else changed.log_softmax(-1)
        doubt = logits.abs().amax(-1) * _ROUNDING / self._temperature[:, 0]
        close = self._never
        if self._cut:
            kept, close = _cut(changed, self._params, doubt)
            processed = kept.log_softmax(-1)
        tokens, near = self._chosen(processed, doubt, drawn.shape[1])
        chosen = tokens.unsqueeze(1)
        of_raw = raw.gather(1, chosen).squeeze(1)
        of_processed = of_raw if processed is raw else processed.gather(1, chosen).squeeze(1)
        of_tempered = of_processed if tempered is processed else tempered.gather(1, chosen).squeeze(1)
        return Step(tokens, of_raw, of_processed, of_tempered, close | near)

    def _chosen(self, processed: Tensor, doubt: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The token of each sample, and whether rounding might have decided about it."""
        greedy, close = self._never, self._never
        if self._any_greedy:
            likeliest, which = processed.topk(2)
            greedy, close = which[:, 0], likeliest[:, 0] - likeliest[:, 1] <= doubt
            if bool(close.any()):
                greedy = processed.argmax(-1)  # the first of several
        if self._all_greedy:
            return greedy, close
        drawn, near = _inverse(processed.exp(), mixed(self._seeds, count), doubt)
        return torch.where(self._greedy, greedy, drawn), torch.where(self._greedy, close, near)

    def _changed(self, logits: Tensor, drawn: NDArray[np.int64]) -> Tensor:
        if not self._special:
            return logits
        logits = logits.clone()
        for row in self._special:
            params, sample = self._params[row], self._samples[row]
            if sample.penalties == "SGLang":
                _penalise(logits[row], params, (), drawn[row].tolist())
            for token, bias in (params.logit_bias or {}).items():
                logits[row, int(token)] += bias
            if sample.penalties == "vLLM":
                _penalise(logits[row], params, sample.tokens, drawn[row].tolist())
            if drawn.shape[1] < params.min_tokens:
                logits[row, sorted(self._ends[row])] = _NEVER
        return logits


def _penalises(params: SamplingParams) -> bool:
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1)


def _penalise(logits: Tensor, params: SamplingParams, prompt: Sequence[int], drawn: Sequence[int]) -> None:
    """Change the logits (V,) of one sample.

    The repetition penalty (Keskar et al., 2019) counts ``prompt`` and completion, the others the completion alone.
    """
    if params.repetition_penalty != 1:
        seen = sorted({*prompt, *drawn})
        found = logits[seen]
        logits[seen] = torch.where(found > 0, found / params.repetition_penalty, found * params.repetition_penalty)
    if drawn:
        tokens, counts = torch.tensor(drawn).unique(return_counts=True)
        logits[tokens] -= params.frequency_penalty * counts + params.presence_penalty


def _cut(logits: Tensor, params: Sequence[SamplingParams], doubt: Tensor) -> tuple[Tensor, Tensor]:
    """Forbid what ``min_p``, ``top_k`` and ``top_p`` forbid, in this order; and where ``doubt`` (B,) may decide it."""
    size = logits.shape[1]
    top_k = torch.tensor([each.top_k if 0 < each.top_k < size else size for each in params]).unsqueeze(1)
    top_p = torch.tensor([each.top_p for each in params], dtype=torch.float64).unsqueeze(1)
    min_p = torch.tensor([each.min_p for each in params], dtype=torch.float64).unsqueeze(1)
    doubt = doubt.unsqueeze(1)
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    above = ordered - (ordered[:, :1] + min_p.log())
    last = ordered.gather(1, top_k - 1) - ordered.gather(1, top_k.clamp(max=size - 1))
    close = (above.abs() <= doubt).any(1) | ((last <= doubt) & (top_k < size)).squeeze(1)
    ordered = ordered.masked_fill(above < 0, _NEVER)
    ordered = ordered.masked_fill(torch.arange(size) >= top_k, _NEVER)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs
    close |= (((before - top_p).abs() <= doubt) & (probs > 0) & (top_p < 1)).any(1)
    ordered = ordered.masked_fill((before >= top_p) & (torch.arange(size) > 0), _NEVER)
    return torch.empty_like(logits).scatter_(1, order, ordered), close


def _inverse(probs: Tensor, numbers: np.ndarray, doubt: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulated probability passes a uniform number, and whether it nearly does not.

    From (B, V), (B,) and (B,) to (B,) and (B,).
    """
    cumulated = probs.cumsum(-1)
    wanted = torch.from_numpy(uniform(numbers)).unsqueeze(1) * cumulated[:, -1:]
    found = torch.searchsorted(cumulated, wanted, right=True)
    last = probs.shape[1] - 1 - (probs.flip(-1) > 0).to(torch.int8).argmax(-1, keepdim=True)
    found = torch.minimum(found, last)
    over = cumulated.gather(1, found) - wanted
    under = probs.gather(1, found) - over
    return found.squeeze(1), (torch.minimum(over, under).squeeze(1) <= doubt)
