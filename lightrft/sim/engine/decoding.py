"""Completions of a batch of samples, written down token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightrft.sim.engine.samples import Drawn, Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lightrft.sim.engine.drawing import Step
    from lightrft.strategy.sampling import SamplingParams

__all__ = ["Decoding"]


class Decoding:
    """What has been drawn of B samples, which all began together.

    Args:
        samples: B of them.
        ends: token ids that end a completion of each.
        stop_in: the text that the last token has completed, see ``LanguageModel.stop_in``.

    Attributes:
        tokens: that were drawn, (B, most tokens of any).
        limits: most tokens of each, (B,).
        most: of any.
        count: tokens of those that go on.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        ends: Sequence[frozenset[int]],
        stop_in: Callable[[Sequence[int], SamplingParams], str | None],
    ) -> None:
        self._samples = samples
        self._stop_in = stop_in
        self.limits = np.array([sample.params.max_tokens or 1 for sample in samples])
        self.most = int(self.limits.max())
        self.tokens = np.zeros((len(samples), self.most), dtype=np.int64)
        self._log_probs = np.zeros((3, len(samples), self.most))
        self._lengths = np.zeros(len(samples), dtype=np.int64)
        self._open = np.ones(len(samples), dtype=np.bool_)
        self.count = 0
        self._least = np.array([sample.params.min_tokens for sample in samples])
        self._stopped: dict[int, int | str | None] = {}
        self._ends = [
            (np.array(sorted(several)), np.array([own == several for own in ends])) for several in set(ends) if several
        ]
        self._texts = frozenset(row for row, sample in enumerate(samples) if sample.params.stop)

    def add(self, rows: NDArray[np.int64], step: Step) -> NDArray[np.bool_]:
        """Write one step down.

        Args:
            rows: samples that it was drawn for; those that are complete are passed over.
            step: of these samples.

        Returns:
            For each of ``rows`` whether it goes on.
        """
        going, tokens = self._open[rows], step.tokens.numpy()
        mine = rows[going]
        self.tokens[mine, self.count] = tokens[going]
        kinds = (step.raw,) if step.tempered is step.raw else (step.raw, step.processed, step.tempered)
        self._log_probs[:, mine, self.count] = np.stack([each.numpy()[going] for each in kinds])
        self.count += 1
        self._lengths[mine] = self.count
        ended = self._ended(rows, tokens) & going
        for row in rows[ended].tolist():
            self._stopped[row] = self._stop_of(row)
        self._open[rows] = going & ~ended & (self.count < self.limits[rows])
        found_open: NDArray[np.bool_] = self._open[rows]
        return found_open

    def is_open(self, row: int) -> bool:
        """Whether a sample is not complete."""
        return bool(self._open[row])

    def _ended(self, rows: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        found = np.zeros(len(rows), dtype=np.bool_)
        for ends, whose in self._ends:
            found |= np.isin(tokens, ends) & whose[rows]
        if self._texts:
            found |= np.array([row in self._texts and self._text(row) is not None for row in rows.tolist()])
        return found & (self.count > self._least[rows])

    def _text(self, row: int) -> str | None:
        return self._stop_in(self.tokens[row, : self.count].tolist(), self._samples[row].params)

    def _stop_of(self, row: int) -> int | str | None:
        """The token or text of the parameters that ended a completion, if it was one of them."""
        last = int(self.tokens[row, self.count - 1])
        if last in self._samples[row].params.stop_token_ids:
            return last
        is_end = any(whose[row] and last in ends for ends, whose in self._ends)
        return None if is_end else self._text(row)

    def drawn(self) -> list[Drawn]:
        """The completions, in order."""
        return [self._drawn(row, length) for row, length in enumerate(self._lengths.tolist())]

    def _drawn(self, row: int, length: int) -> Drawn:
        log_probs: list[Any] = [tuple(kind[row, :length].tolist()) for kind in self._log_probs]
        return Drawn(
            tokens=tuple(self.tokens[row, :length].tolist()),
            raw=log_probs[0],
            processed=log_probs[1],
            tempered=log_probs[2],
            finish_reason="stop" if row in self._stopped else "length",
            stop=self._stopped.get(row),
        )
