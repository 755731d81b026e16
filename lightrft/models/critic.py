"""The critic: what reward is still to come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightrft.models.value_model import ValueModel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Critic"]


class Critic(ValueModel):
    """A number for each token: what it is worth to have come so far."""

    def forward(
        self, sequences: Tensor, attention_mask: Tensor, *, packed: bool | None = None, **images: Any
    ) -> Tensor:
        """The value of the sequence up to each token, that token included.

        Args:
            sequences: token ids, shape (batch, length), padded on either side or both.
            attention_mask: of that shape, 1 for real tokens.
            packed: compute several samples in one row, without padding; as ``packing_samples`` says if ``None``.
            images: what the model sees, as in ``Actor``.

        Returns:
            Shape (batch, length), in fp32; zero for padding.

        Raises:
            ConfigError: shapes do not fit.
        """
        return self.values(sequences, attention_mask, packed, images)
