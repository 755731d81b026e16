"""``vllm.outputs`` and ``vllm.logprobs``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableSequence, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

__all__ = ["CompletionOutput", "FlatLogprobs", "Logprob", "RequestOutput"]


@dataclass
class Logprob:
    """The log-prob of one token; the likeliest has rank 1."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs(MutableSequence[dict[int, Logprob]]):
    """Log-probs of all positions in lists, where ``SamplingParams.flat_logprobs`` asks for them.

    Those of position ``i`` are at ``start_indices[i]`` to ``end_indices[i]`` of the other lists. It grows at its end
    alone.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)
    _count: ClassVar[int] = 0

    @classmethod
    def _of(cls, token_ids: Sequence[int], logprobs: Sequence[float]) -> FlatLogprobs:
        """With one log-prob at each position, whose rank and text are unknown, as in ``Logprob``.

        The other lists are made when they are asked for.
        """
        made = cls.__new__(cls)
        vars(made).update(token_ids=list(token_ids), logprobs=list(logprobs), _count=len(token_ids))
        return made

    def __getattr__(self, name: str) -> Any:
        if name not in _MADE:
            raise AttributeError(f"{type(self).__name__} has no {name}")
        found = _MADE[name](self._count)
        setattr(self, name, found)
        return found

    def append(self, logprobs_one_position: dict[int, Logprob] | None) -> None:
        """Add a position."""
        several = logprobs_one_position or {}
        found = several.values()
        self.append_fast(
            list(several),
            [one.logprob for one in found],
            [one.rank for one in found],
            [one.decoded_token for one in found],
        )

    def append_fast(
        self,
        token_ids: list[int],
        logprobs: list[float],
        ranks: Iterable[int | None],
        decoded_tokens: Iterable[str | None],
    ) -> None:
        """Add a position, by the lists of what is there."""
        self.start_indices.append(len(self.logprobs))
        for token, logprob, rank, text in zip(token_ids, logprobs, ranks, decoded_tokens, strict=False):
            self.token_ids.append(token)
            self.logprobs.append(logprob)
            self.ranks.append(rank)
            self.decoded_tokens.append(text)
        self.end_indices.append(len(self.logprobs))

    def extend(self, logprobs_multi_positions: Iterable[dict[int, Logprob] | None]) -> None:
        """Add positions."""
        for one in logprobs_multi_positions:
            self.append(one)

    def __len__(self) -> int:
        return len(self.start_indices)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            chosen = FlatLogprobs()
            chosen.extend(self[each] for each in range(*position.indices(len(self))))
            return chosen
        start, end = self.start_indices[position], self.end_indices[position]
        return {
            self.token_ids[each]: Logprob(self.logprobs[each], self.ranks[each], self.decoded_tokens[each])
            for each in range(start, end)
        }

    def __setitem__(self, position: Any, value: Any) -> None:
        raise TypeError("log-probs of a position cannot be replaced: positions are added at the end")

    def __delitem__(self, position: Any) -> None:
        raise TypeError("a position cannot be taken away: positions are added at the end")

    def insert(self, index: int, value: dict[int, Logprob] | None) -> None:  # noqa: ARG002
        """Not possible: positions are added at the end."""
        raise TypeError("a position cannot be put between others: positions are added at the end")


_MADE: dict[str, Callable[[int], list[Any]]] = {
    "start_indices": lambda count: list(range(count)),
    "end_indices": lambda count: list(range(1, count + 1)),
    "ranks": lambda count: [None] * count,
    "decoded_tokens": lambda count: [None] * count,
}


@dataclass
class CompletionOutput:
    """One sample of one prompt."""

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: Sequence[dict[int, Logprob]] | None
    routed_experts: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: Any = None
    sampling_mask: Any = None
    spec_decode_metrics: Any = None
    weight_versions: Any = None

    def finished(self) -> bool:
        """Whether it has come to its end."""
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """All samples of one prompt."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool
    metrics: Any = None
    lora_request: Any = None
    encoder_prompt: str | None = None
    encoder_prompt_token_ids: list[int] | None = None
    num_cached_tokens: int | None = None
    num_cache_creation_tokens: int | None = None
    prompt_token_id_logprobs: Any = field(default=None, kw_only=True)
    kv_transfer_params: dict[str, Any] | None = field(default=None, kw_only=True)
    ec_transfer_params: dict[str, Any] | None = field(default=None, kw_only=True)


for _each in (CompletionOutput, RequestOutput):
    _each.__module__ = "vllm.outputs"
for _other in (FlatLogprobs, Logprob):
    _other.__module__ = "vllm.logprobs"
