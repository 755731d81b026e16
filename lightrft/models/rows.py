"""A batch of samples as the rows that a model computes: as they are, or packed, several samples in a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lightrft.errors import ConfigError
from lightrft.models.packing import pack

__all__ = ["NO_LABEL", "Rows", "check_batch", "packed_rows", "padded_rows"]

NO_LABEL = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows of tokens, and where the tokens of the batch are in them.

    Attributes:
        input_ids: shape (rows, row length).
        attention_mask: of that shape, 1 for real tokens; ``None`` for packed rows, whose position ids tell samples
            apart: attention never crosses a place where they restart.
        position_ids: of that shape, counted from the first real token of each sample.
        labels: of that shape: the token itself where the one before it is of the same sample, else ``NO_LABEL``.
        real: which tokens of the batch are real, shape (batch, length).
        places: for each token of the batch, shape (batch, length), its place in the flattened rows; 0 for padding.
            ``None`` if the rows are the batch.
        order: numbers of the samples as they follow each other in the rows; ``None`` if the rows are the batch.
    """

    input_ids: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor
    labels: Tensor
    real: Tensor
    places: Tensor | None = None
    order: tuple[int, ...] | None = None

    def packed(self, values: Tensor) -> Tensor:
        """Values of the tokens of the batch, shape (batch, length), at their places in the rows; zero elsewhere."""
        return (
            values if self.places is None else _placed(values, self.real, self.places, torch.zeros_like(self.input_ids))
        )

    def unpacked(self, values: Tensor) -> Tensor:
        """Values of the tokens in the rows, shape (rows, row length), as shape (batch, length); zero for padding."""
        if self.places is not None:
            values = values.flatten()[self.places]
        return torch.where(self.real, values, values.new_zeros(()))


def check_batch(sequences: Tensor, attention_mask: Tensor) -> Tensor:
    """Which tokens are real, shape (batch, length), bool.

    Raises:
        ConfigError: shapes do not fit, or the real tokens of a sample do not follow each other.
    """
    if sequences.dim() != 2 or sequences.shape != attention_mask.shape:
        raise ConfigError(
            f"got sequences of shape {tuple(sequences.shape)} and an attention mask of shape "
            f"{tuple(attention_mask.shape)}: expected both of shape (batch, length)"
        )
    real = attention_mask.bool()
    begins = (real & ~functional.pad(real[:, :-1], (1, 0))).sum(1)
    if (begins > 1).any():
        sample = int((begins > 1).nonzero()[0])
        raise ConfigError(
            f"the attention mask of sample {sample} has padding between real tokens: expected padding before and after "
            "them only; join prompt and response without a gap"
        )
    return real


def padded_rows(sequences: Tensor, real: Tensor) -> Rows:
    """The batch as it is."""
    return Rows(
        input_ids=sequences,
        attention_mask=real.long(),
        position_ids=_positions(real),
        labels=_labels(sequences, real),
        real=real,
    )


def packed_rows(sequences: Tensor, real: Tensor, *, one_row: bool = False) -> Rows:
    """The real tokens of the batch in as few rows as they need, each as long as the longest of them.

    What is left of a row is a sample of its own, which belongs to none of the batch.

    Args:
        sequences: shape (batch, length).
        real: of that shape, see ``check_batch``.
        one_row: put all samples into one row, as flash attention wants it.
    """
    lengths = real.sum(1).tolist()
    rows = pack(lengths, max(sum(lengths) if one_row else max(lengths, default=0), 1)) or [[]]
    totals = [sum(lengths[number] for number in row) for row in rows]
    width = max([*totals, 1])
    begins = [0] * len(lengths)
    for row, samples in enumerate(rows):
        place = row * width
        for number in samples:
            begins[number] = place
            place += lengths[number]
    own = _positions(real)
    places = torch.where(real, own + own.new_tensor(begins)[:, None], 0)
    beyond = torch.arange(width, device=own.device) - own.new_tensor(totals)[:, None]
    labels = _labels(sequences, real)
    return Rows(
        input_ids=_placed(sequences, real, places, torch.zeros_like(beyond)),
        attention_mask=None,
        position_ids=_placed(own, real, places, beyond.clamp(min=0)),
        labels=_placed(labels, real, places, torch.full_like(beyond, NO_LABEL)),
        real=real,
        places=places,
        order=tuple(number for samples in rows for number in samples),
    )


def _placed(values: Tensor, real: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    """``values`` of real tokens written over ``rows``."""
    rows.view(-1)[places[real]] = values[real].to(rows.dtype)
    return rows


def _positions(real: Tensor) -> Tensor:
    """The place of each token among the real ones of its sample; of padding, any that is not negative."""
    return (real.long().cumsum(1) - 1).clamp(min=0)


def _labels(sequences: Tensor, real: Tensor) -> Tensor:
    known = real & functional.pad(real[:, :-1], (1, 0))
    return sequences.masked_fill(~known, NO_LABEL)
