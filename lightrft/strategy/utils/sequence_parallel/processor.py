"""A batch cut into slices of its sequences, and values of the slices put together again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional

from lightrft.errors import ConfigError
from lightrft.strategy.utils.sequence_parallel.exchange import gather_sequence

__all__ = ["SequenceParallelProcessor", "SequenceSlice"]

_IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceSlice:
    """This rank's part of a batch of sequences.

    The full length is ``length`` plus what is padded at the end so that every rank has as many tokens; each tensor
    has shape (batch, local length), that is (batch, padded length / sp_size).

    Attributes:
        input_ids: token ids.
        attention_mask: 1 for real tokens, 0 for padding; None if the batch came without.
        position_ids: place of each token in its sequence. With one rank None if the batch came without.
        next_ids: the token that follows each of ``input_ids``, across the end of the slice too; 0 where none follows.
        shift_labels: the label of the token that follows, -100 where none follows; None if the batch came without.
        length: of the sequences as they were given.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    next_ids: torch.Tensor
    shift_labels: torch.Tensor | None
    length: int

    @property
    def inputs(self) -> dict[str, torch.Tensor | None]:
        """Arguments for the model."""
        names = ("input_ids", "attention_mask", "position_ids")
        return {name: getattr(self, name) for name in names}


class SequenceParallelProcessor:
    """Slices batches and gathers what a model makes of the slices.

    All ranks of the group pass the same batch. Every rank then computes the same loss from gathered values, and
    gradients are averaged over all ranks of the world, as without sequence parallelism (`gather_sequence` shows why)::

        part = processor.preprocess(input_ids, attention_mask)
        logits = model(**part.inputs).logits
        log_probs = processor.gather_log_probs(logits, part)  # (batch, length - 1), the same on all ranks

    Args:
        group: the ranks that share each sequence; None or a group of one rank: nothing is cut.

    Attributes:
        group: the same.
        size: how many ranks share a sequence.
        rank: which of them this one is.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def preprocess(
        self,
        input_ids: torch.Tensor | Mapping[str, Any],
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceSlice:
        """Pad to a multiple of the number of ranks, and take this rank's part. No communication.

        Args:
            input_ids: shape (batch, length); or a mapping that has it and the others under their names.
            attention_mask: shape (batch, length), 1 for real tokens. Without one all tokens are real.
            position_ids: shape (batch, length) or (1, length); by default 0, 1, ... from the start of the row, as
                transformers has it. Where they restart a new sequence begins, if there is no attention mask: that is
                how packed sequences are given, and it is the rule of transformers too.
            labels: shape (batch, length), not shifted, -100 where there is none.

        Raises:
            ConfigError: a shape does not fit, or the mapping has another name.
        """
        if isinstance(input_ids, Mapping):
            return self._of_mapping(input_ids)
        shape = input_ids.shape
        _check("input_ids", input_ids, [shape] if len(shape) == 2 else [])
        _check("attention_mask", attention_mask, [shape])
        _check("position_ids", position_ids, [shape, (1, shape[1])])
        _check("labels", labels, [shape])
        if self.size > 1 and position_ids is None:
            position_ids = torch.arange(shape[1], device=input_ids.device)[None]
        return SequenceSlice(
            input_ids=self._cut(input_ids),
            attention_mask=None if attention_mask is None else self._cut(attention_mask),
            position_ids=None if position_ids is None else self._cut_positions(position_ids.expand(shape)),
            next_ids=self._cut(functional.pad(input_ids[:, 1:], (0, 1))),
            shift_labels=(
                None
                if labels is None
                else self._cut(functional.pad(labels[:, 1:], (0, 1), value=_IGNORED), padding=_IGNORED)
            ),
            length=shape[1],
        )

    def postprocess(self, values: torch.Tensor, length: int) -> torch.Tensor:
        """The values of all slices, without those of padding; on every rank the same, with gradient.

        In backward each rank gets its slice of its own gradient times the number of ranks, which makes the mean of
        parameter gradients over ALL ranks of the world right: see `gather_sequence`. So the loss must be the same on
        all ranks of the group, and must not be averaged over them once more.

        Args:
            values: one or more for each token of the slice (log-probs, values, rewards): shape
                (batch, local length, ...).
            length: of the sequences before they were cut, ``SequenceSlice.length``.

        Returns:
            Shape (batch, length, ...).

        Raises:
            ConfigError: there are not as many values as tokens in the slice of a sequence of that length.
        """
        expected = self._local_length(length)
        if values.dim() < 2 or values.shape[1] != expected:
            raise ConfigError(
                f"got values of shape {tuple(values.shape)} for sequences of length {length} on {self.size} ranks, "
                f"expected (batch, {expected}, ...): pass one value for each token of the slice"
            )
        if self.group is None or self.size == 1:
            return values
        return gather_sequence(values, self.group)[:, :length]

    def gather_log_probs(self, logits: torch.Tensor, part: SequenceSlice) -> torch.Tensor:
        """Log-probs of the tokens of the full sequences, each given those before it; see `postprocess` for gradients.

        Args:
            logits: of the slice, shape (batch, local length, vocabulary); divide them by the temperature first.
            part: the slice that the model was given.

        Returns:
            Shape (batch, length - 1), float32: entry ``t`` is the log-prob of token ``t + 1``.
        """
        flat = functional.cross_entropy(logits.flatten(0, 1).float(), part.next_ids.flatten(), reduction="none")
        return self.postprocess(-flat.view_as(part.next_ids), part.length)[:, : part.length - 1]

    def _of_mapping(self, batch: Mapping[str, Any]) -> SequenceSlice:
        names = ("input_ids", "attention_mask", "position_ids", "labels")
        unknown = sorted(set(batch) - set(names))
        if unknown or "input_ids" not in batch:
            raise ConfigError(
                f"got a batch with {', '.join(sorted(batch)) or 'nothing'}; expected input_ids and perhaps "
                f"{', '.join(names[1:])}: keep what belongs to the full sequences out of it"
            )
        return self.preprocess(batch["input_ids"], *(batch.get(name) for name in names[1:]))

    def _local_length(self, length: int) -> int:
        return -(-length // self.size)

    def _cut(self, tensor: torch.Tensor, padding: int = 0) -> torch.Tensor:
        if self.size == 1:
            return tensor
        local = self._local_length(tensor.shape[1])
        padded = functional.pad(tensor, (0, local * self.size - tensor.shape[1]), value=padding)
        return padded[:, self.rank * local : (self.rank + 1) * local].contiguous()

    def _cut_positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Padding goes on with the last sequence: no token before it sees it, and no mask is needed for its sake."""
        missing = self._local_length(positions.shape[1]) * self.size - positions.shape[1]
        more = positions[:, -1:] + torch.arange(1, missing + 1, device=positions.device)
        return self._cut(torch.cat([positions, more], dim=1))


def _check(name: str, tensor: torch.Tensor | None, expected: list[Any]) -> None:
    if tensor is not None and tuple(tensor.shape) not in [tuple(shape) for shape in expected]:
        shapes = " or ".join(str(tuple(shape)) for shape in expected) or "(batch, length)"
        raise ConfigError(f"got {name} of shape {tuple(tensor.shape)}, expected {shapes}")
