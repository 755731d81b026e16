"""``vllm.outputs`` and ``vllm.logprobs``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CompletionOutput", "FlatLogprobs", "Logprob", "RequestOutput"]


@dataclass
class Logprob:
    """The log-prob of one token; the likeliest has rank 1."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class FlatLogprobs(Sequence[dict[int, Logprob]]):
    """Log-probs of all positions in lists, where ``SamplingParams.flat_logprobs`` asks for them; one at each."""

    token_ids: Sequence[int]
    logprobs: Sequence[float]

    @property
    def start_indices(self) -> list[int]:
        """Where the log-probs of each position begin."""
        return list(range(len(self.token_ids)))

    @property
    def end_indices(self) -> list[int]:
        """Where they end."""
        return list(range(1, len(self.token_ids) + 1))

    @property
    def ranks(self) -> list[int | None]:
        """Unknown, as ``Logprob.rank``."""
        return [None] * len(self.token_ids)

    @property
    def decoded_tokens(self) -> list[str | None]:
        """Unknown, as ``Logprob.decoded_token``."""
        return [None] * len(self.token_ids)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            return FlatLogprobs(self.token_ids[position], self.logprobs[position])
        return {self.token_ids[position]: Logprob(self.logprobs[position])}


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
