"""The policy: a language model that says how likely given tokens are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightrft.errors import ConfigError
from lightrft.models import loading
from lightrft.models.forward_pass import ForwardPass, in_place_of_forward
from lightrft.models.fused import fused_linear_log_probs
from lightrft.models.log_probs import TokenScores, bias_of, check_temperature, token_log_probs
from lightrft.models.rows import NO_LABEL
from lightrft.strategy.config import StrategyConfig

__all__ = ["Actor"]


class Actor(nn.Module):
    """A causal language model of transformers, or one that sees (Qwen2-VL family), as RL trains it.

    It goes through ``strategy.prepare`` like any module. Weights keep the names of the checkpoint, after ``model.``.

    Args:
        model: of transformers, perhaps with adapters of PEFT.
        settings: pass ``strategy.config``; the defaults if ``None``. ``fused_linear_logprob``, ``chunk_size`` and
            ``packing_samples`` say how log-probs are computed, ``mixed_mm_data`` lets samples of some ranks have images
            and those of others none, and ``seed`` sets the first weights of adapters.

    Attributes:
        model: the same.
    """

    def __init__(self, model: nn.Module, settings: StrategyConfig | None = None) -> None:
        super().__init__()
        self.model: Any = model
        self._settings = settings or StrategyConfig()

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
            path: a folder or a name, of a model or of adapters that were saved.
            dtype: of the weights; fp32 if ``None``. A strategy casts them to what it computes in.
            lora: settings of LoRA adapters to train in place of the weights: a mapping or a ``peft.LoraConfig``.
            settings: as above.
            kwargs: of ``from_pretrained`` of transformers, such as ``attn_implementation``.
        """
        settings = settings or StrategyConfig()
        return cls(loading.language_model_of(str(path), dtype, lora, settings.seed, **kwargs), settings)

    @property
    def config(self) -> Any:
        """That of the model."""
        return self.model.config

    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor,
        *,
        temperature: float = 1.0,
        entropy: bool = False,
        logit_bias: Mapping[int, float] | None = None,
        packed: bool | None = None,
        **images: Any,
    ) -> TokenScores:
        """The log-prob of each token given those before it, as an engine computes it when it draws.

        Args:
            sequences: token ids, shape (batch, length): prompt and response, padded on either side or both.
            attention_mask: of that shape, 1 for real tokens.
            temperature: with which the tokens were drawn.
            entropy: compute that of the distributions too.
            logit_bias: what the engine added to the logits of some tokens, by token id; -100 for those never drawn.
            packed: compute several samples in one row, without padding; as ``packing_samples`` says if ``None``.
            images: what the model sees: ``pixel_values`` and ``image_grid_thw`` of all images of the batch in order,
                or ``pixel_values_videos`` and ``video_grid_thw``.

        Returns:
            Scores of shape (batch, length - 1), in fp32: entry ``t`` is of token ``t + 1``. Zero for padding, and for
            the first token of a sample, before which there is none.

        Raises:
            ConfigError: shapes do not fit, or ``temperature`` is not positive.
        """
        check_temperature(temperature)
        run = ForwardPass.of(
            self.model, sequences, attention_mask, settings=self._settings, packed=packed, images=images
        )
        labels = run.part.shift_labels
        assert labels is not None
        wanted = labels != NO_LABEL
        computes = self._fused if self._settings.fused_linear_logprob else self._plain
        log_probs, spread = computes(
            run, wanted, labels[wanted], logit_bias or {}, temperature=temperature, entropy=entropy
        )
        return TokenScores(_over(wanted, log_probs, run), None if spread is None else _over(wanted, spread, run))

    def _plain(
        self, run: ForwardPass, wanted: Tensor, tokens: Tensor, logit_bias: Mapping[int, float], **how: Any
    ) -> TokenScores:
        """The output layer computes logits of the tokens that are asked for alone."""
        layer = self._output_layer()
        computes = layer.forward
        with in_place_of_forward(layer, lambda hidden: computes(hidden[wanted])):
            logits = run.output_of(self.model).logits
        bias = bias_of(logit_bias, logits.shape[-1], logits.device) if logit_bias else None
        return token_log_probs(logits, tokens, bias=bias, **how)

    def _fused(
        self, run: ForwardPass, wanted: Tensor, tokens: Tensor, logit_bias: Mapping[int, float], **how: Any
    ) -> TokenScores:
        """The output layer gives log-probs (and entropies) where the model expects logits.

        It is called as a module, so that FSDP2 and ZeRO-3 gather its weight for it, and again in the backward pass.
        """
        layer = self._output_layer()
        if type(layer).forward is not nn.Linear.forward:
            raise ConfigError(
                f"fused_linear_logprob: the output layer of {type(self.model).__name__} is a {type(layer).__name__}: "
                "expected a linear layer without adapters; leave it out of the adapters, or switch the setting off"
            )
        given: list[int] = []

        def computes(hidden: Tensor) -> Tensor:
            bias = layer.bias
            if logit_bias:
                added = bias_of(logit_bias, layer.weight.shape[0], hidden.device)
                bias = added if bias is None else bias + added
            scores = fused_linear_log_probs(
                hidden[wanted], layer.weight, tokens, bias=bias, chunk_size=self._settings.chunk_size, **how
            )
            both = torch.stack([one for one in scores if one is not None])
            given.append(both.data_ptr())
            return both

        with in_place_of_forward(layer, computes):
            both = run.output_of(self.model).logits
        if both.data_ptr() not in given:
            raise ConfigError(
                f"fused_linear_logprob: {type(self.model).__name__} changes what its output layer gives (a cap or a "
                "scale of logits): switch the setting off"
            )
        return TokenScores(*both.unbind())

    def _output_layer(self) -> Any:
        layer = self.model.get_output_embeddings()
        if layer is None:
            raise ConfigError(f"{type(self.model).__name__} has no output layer: expected a language model")
        return layer


def _over(wanted: Tensor, values: Tensor, run: ForwardPass) -> Tensor:
    """``values`` of the tokens that are ``wanted``, shape (batch, length - 1); zero elsewhere."""
    spread = run.of_batch(values.new_zeros(wanted.shape).masked_scatter(wanted, values))
    return spread[:, :-1].clone()  # FSDP2 wants no view
