"""One forward pass of a transformers model over a batch: padded or packed, whole or shared by several ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightrft.models import images as pictures
from lightrft.models.rows import Rows, check_batch, packed_rows, padded_rows
from lightrft.strategy.utils.sequence_parallel import SequenceParallelProcessor, SequenceSlice, group_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lightrft.strategy.config import StrategyConfig

__all__ = ["ForwardPass", "in_place_of_forward"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardPass:
    """What goes into the model, and how what comes out belongs to the batch.

    Attributes:
        rows: that the ranks of one sequence-parallel group compute together.
        part: what this rank computes of them.
        inputs: arguments for the model.
        mixed: whether other ranks may have images where this one has none, or the other way round.
    """

    rows: Rows
    part: SequenceSlice
    inputs: dict[str, Any]
    mixed: bool
    _processor: SequenceParallelProcessor

    @classmethod
    def of(
        cls,
        model: nn.Module,
        sequences: Tensor,
        attention_mask: Tensor,
        *,
        settings: StrategyConfig,
        packed: bool | None,
        images: Mapping[str, Any],
    ) -> ForwardPass:
        """Prepare a pass of ``model``.

        Args:
            model: of transformers, or adapters of PEFT around one.
            sequences: token ids, shape (batch, length), padded on either side.
            attention_mask: of that shape, 1 for real tokens.
            settings: of which ``packing_samples`` and ``mixed_mm_data`` count.
            packed: let samples share rows; as the settings say if ``None``.
            images: arguments of a model that sees, such as ``pixel_values`` and ``image_grid_thw``.

        Raises:
            ConfigError: the batch is no batch, or the images do not fit it.
        """
        real = check_batch(sequences, attention_mask)
        packs = settings.packing_samples if packed is None else packed
        rows = packed_rows(sequences, real, one_row=_is_flash(model)) if packs else padded_rows(sequences, real)
        processor = SequenceParallelProcessor(group_of(model))
        part = processor.preprocess(rows.input_ids, rows.attention_mask, rows.position_ids, rows.labels)
        inputs = {**part.inputs, "use_cache": False, **pictures.inputs(model, sequences, rows, images)}
        return cls(rows=rows, part=part, inputs=inputs, mixed=settings.mixed_mm_data, _processor=processor)

    def output_of(self, model: nn.Module) -> Any:
        """What ``model``, or the body of it, makes of the inputs."""
        with pictures.blank_image(model, self.inputs) if self.mixed else nullcontext():
            return model(**self.inputs)

    def of_batch(self, values: Tensor) -> Tensor:
        """One value for each token that this rank computed, as shape (batch, length); zero for padding."""
        return self.rows.unpacked(self._processor.postprocess(values, self.part.length))


@contextmanager
def in_place_of_forward(module: nn.Module, function: Any) -> Iterator[None]:
    """Let a call of ``module`` run ``function``, hooks of FSDP2 and DeepSpeed around it as ever."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _is_flash(model: nn.Module) -> bool:
    config: Any = model.config
    return str(getattr(config, "_attn_implementation", "")).startswith("flash_attention")
