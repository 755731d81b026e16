"""The reward model: how good a whole sequence is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightrft.models.value_model import ValueModel

__all__ = ["RewardModel"]


class RewardModel(ValueModel):
    """A number for each sequence."""

    def forward(
        self, sequences: Tensor, attention_mask: Tensor, *, packed: bool | None = None, **images: Any
    ) -> Tensor:
        """The score at the last real token of each sequence.

        Args:
            sequences: token ids, shape (batch, length), padded on either side or both.
            attention_mask: of that shape, 1 for real tokens. It alone says which token is the last one: a padding
                token may be the end token.
            packed: compute several samples in one row, without padding; as ``packing_samples`` says if ``None``.
            images: what the model sees, as in ``Actor``.

        Returns:
            Shape (batch,), in fp32; zero for a sequence without real tokens.

        Raises:
            ConfigError: shapes do not fit.
        """
        values = self.values(sequences, attention_mask, packed, images)
        places = torch.arange(values.shape[1], device=values.device)
        last = torch.where(attention_mask.bool(), places, 0).amax(1, keepdim=True)
        return values.gather(1, last).sum(1)
