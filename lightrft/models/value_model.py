"""A number for each token or each sequence: what critic and reward model have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightrft.models import loading
from lightrft.models.forward_pass import ForwardPass
from lightrft.models.log_probs import score_dtype
from lightrft.strategy.config import StrategyConfig

__all__ = ["ValueHead", "ValueModel"]


class ValueHead(nn.Linear):
    """One number of the hidden state of a token.

    It gets its weight while it is built, since afterwards ZeRO-3 may hold a part of it alone. Every rank makes the same
    one, whatever it has drawn before, and draws nothing from the global generator.

    Args:
        width: of the hidden state.
        seed: of the weight: normal, so that values of a normalised hidden state have a spread of about one.
        weight: shape (1, width), in place of a random one.
    """

    def __init__(
        self, width: int, *, seed: int, weight: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self._first = (seed, weight)
        super().__init__(width, 1, bias=False, dtype=dtype)
        del self._first

    def reset_parameters(self) -> None:
        """Give the weight its first values."""
        if self.weight.is_meta:  # another rank has them
            return
        seed, weight = self._first
        if weight is None:
            generator = torch.Generator().manual_seed(seed)
            weight = torch.empty(self.weight.shape, device="cpu")
            weight.normal_(std=(self.in_features + 1) ** -0.5, generator=generator)
        with torch.no_grad():
            self.weight.copy_(weight)


class ValueModel(nn.Module):
    """A transformer without output layer, and a head of one number on top of it.

    Args:
        model: of transformers: a body, a language model, of which the body is taken, or a model for sequence
            classification, whose head is used.
        settings: of which ``packing_samples`` says whether samples share rows, and ``seed`` gives the head its weight;
            the defaults if ``None``. Pass ``strategy.config``.
        head: the weight of the head, shape (1, width), in place of a random one.

    Attributes:
        model: the body, or the model for sequence classification.
        value_head: the head; a model for sequence classification has it inside instead.
    """

    def __init__(self, model: nn.Module, settings: StrategyConfig | None = None, *, head: Tensor | None = None) -> None:
        super().__init__()
        self._settings = settings or StrategyConfig()
        self.model: Any = model
        if _classifies(model):
            return
        body: Any = model
        if body.get_output_embeddings() is not None:
            body = body.base_model
        self.model = body
        dtype = next(self.model.parameters()).dtype
        width = self.model.config.get_text_config().hidden_size
        self.value_head = ValueHead(width, seed=self._settings.seed, weight=head, dtype=dtype)

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        *,
        dtype: torch.dtype | None = None,
        lora: Any = None,
        settings: StrategyConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """The model at ``path``.

        Args:
            path: a folder or a name: of a language model, which gets a head; of a critic or reward model that
                ``strategy.save_model`` wrote; or of a model for sequence classification with one label.
            dtype: of the weights; fp32 if ``None``. A strategy casts them to what it computes in.
            lora: settings of LoRA adapters to train in place of the weights: a mapping or a ``peft.LoraConfig``.
            settings: as above.
            kwargs: of ``from_pretrained`` of transformers, such as ``attn_implementation``.

        Raises:
            ConfigError: the model gives several scores.
        """
        settings = settings or StrategyConfig()
        body = loading.body_of(str(path), dtype, lora, settings.seed, **kwargs)
        return cls(body, settings, head=loading.head_of(str(path), "value_head.weight"))

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.model.config

    def values(
        self, sequences: Tensor, attention_mask: Tensor, packed: bool | None, images: Mapping[str, Any]
    ) -> Tensor:
        """A number for each token, shape (batch, length), in fp32; zero for padding."""
        run = ForwardPass.of(
            self.model, sequences, attention_mask, settings=self._settings, packed=packed, images=images
        )
        body, head = self._parts()
        found = head(run.output_of(body).last_hidden_state).squeeze(-1)
        return run.of_batch(found.to(score_dtype(found.dtype)))

    def _parts(self) -> tuple[Any, Any]:
        if not _classifies(self.model):
            return self.model, self.value_head
        inner = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return inner.base_model, inner.score


def _classifies(model: Any) -> bool:
    return hasattr(model, "score")
