"""``vllm.sampling_params``."""

from __future__ import annotations

import enum
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from lightrft.errors import ConfigError
from lightrft.sim.engine.lacking import RETURNED, Surface, lacks
from lightrft.sim.engine.vllm_face.exceptions import VLLMValidationError
from lightrft.strategy import sampling

__all__ = ["RequestOutputKind", "SamplingParams"]

_COLDEST = 1e-2
"""A temperature below it, and not 0, is raised to it."""

_GREEDY = 1e-5

_MOST_SAMPLES = 16384
"""Of one prompt, where the environment variable ``VLLM_MAX_N_SEQUENCES`` does not say."""

FIELDS = Surface(
    engine="vLLM",
    honoured=frozenset(
        {
            "n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k",
            "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "max_tokens", "min_tokens", "logprobs",
            "flat_logprobs", "detokenize", "skip_special_tokens", "include_stop_str_in_output", "logit_bias",
        }
    ),
    idle={
        "output_kind": RETURNED, "stream_interval": RETURNED, "output_text_buffer_length": RETURNED,
        "skip_clone": "whether the object is copied",
    },
    values={"logprobs": (0,)},
)  # fmt: skip
"""Of ``logprobs``, 0 gives those of the tokens that were drawn, and more would give further tokens."""


class RequestOutputKind(enum.Enum):
    """What a request returns while it runs; at the end all return everything."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    """How completions are drawn. Fields and defaults are those of vLLM."""

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    watermarking: bool | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Any = None
    stop_token_ids: Any = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprob_token_ids: Any = None
    prompt_logprob_start: int | None = None
    logprob_token_ids: list[int] | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    skip_clone: bool = False
    output_text_buffer_length: int = 0
    _eos_token_id: int | None = None
    _all_stop_token_ids: set[int] = field(default_factory=set)
    _watermarking_skipped: bool = False
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    extra_args: dict[str, Any] | None = None
    bad_words: Any = None
    _bad_words_token_ids: Any = None
    skip_reading_prefix_cache: bool | None = None
    thinking_token_budget: int | None = None
    repetition_detection: Any = None
    routed_experts_prompt_start: int = 0
    trace_decode_token_ids: Any = None

    __struct_fields__: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        if 0 < self.temperature < _COLDEST:
            self.temperature = _COLDEST
        self.seed = None if self.seed == -1 else self.seed
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or [])
        self.stop_token_ids = list(dict.fromkeys(self.stop_token_ids or []))
        self.bad_words = list(dict.fromkeys(self.bad_words or []))
        self.logprobs = 1 if self.logprobs is True else self.logprobs
        for name, fits, wanted in self._rules():
            if not fits:
                value = getattr(self, name)
                raise VLLMValidationError(f"{name}={value!r}: expected {wanted}", parameter=name, value=value)
        if self.temperature < _GREEDY:
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0
            if self.n > 1:
                raise VLLMValidationError(f"n={self.n}: expected 1 where the temperature is 0")
        if self.skip_reading_prefix_cache is None:
            self.skip_reading_prefix_cache = self.prompt_logprobs is not None

    def __copy__(self) -> SamplingParams:
        """The same, unchecked: an adapter makes one for each prompt."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        most = int(os.environ.get("VLLM_MAX_N_SEQUENCES", _MOST_SAMPLES))
        yield "n", _whole(self.n) and 1 <= self.n <= most, f"at least 1, and at most {most}"
        yield "presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"
        yield "frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"
        yield "repetition_penalty", 0 < self.repetition_penalty < math.inf, "a finite number above 0"
        yield "temperature", 0 <= self.temperature <= 2, "0 to 2"
        yield "top_p", 0 < self.top_p <= 1, "above 0, at most 1"
        yield "top_k", _whole(self.top_k) and self.top_k >= -1, "0 for all tokens, or a number of tokens"
        yield "min_p", 0 <= self.min_p <= 1, "0 to 1"
        yield "max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"
        yield "min_tokens", 0 <= self.min_tokens <= (self.max_tokens or math.inf), "0 to max_tokens"
        yield "logprobs", self.logprobs is None or self.logprobs >= -1, "-1 or more"
        yield "prompt_logprobs", self.prompt_logprobs is None or self.prompt_logprobs >= -1, "-1 or more"
        yield "stop_token_ids", all(isinstance(one, int) for one in self.stop_token_ids), "integers"
        yield "stop", all(self.stop), "no empty text"
        yield "stop", self.detokenize or not self.stop, "none where detokenize is False"
        yield "bad_words", all(self.bad_words), "no empty text"

    def verify(self, vocab_size: int) -> None:
        """Refuse token ids that the model does not have.

        Raises:
            VLLMValidationError: there are some.
        """
        for name, tokens in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias or {})):
            outside = [token for token in tokens if not 0 <= int(token) < vocab_size]
            if outside:
                raise VLLMValidationError(
                    f"{name} has {outside}: expected token ids below {vocab_size}", parameter=name, value=outside
                )

    def clone(self) -> SamplingParams:
        """A copy."""
        return SamplingParams(**{one.name: getattr(self, one.name) for one in fields(self)})

    def ours(self, max_tokens: int) -> sampling.SamplingParams:
        """What the core understands; ``max_tokens`` where none are given.

        Raises:
            ConfigError: something of it is lacking.
            VLLMValidationError: it has no ``max_tokens``, and fewer than ``min_tokens`` fit.
        """
        if self.logprobs not in (None, 0):
            instead = "logprobs=0 gives those of the tokens that were drawn; take it"
            raise ConfigError(lacks("vLLM", f"logprobs={self.logprobs}", instead))
        FIELDS.check({one.name: getattr(self, one.name) for one in fields(self)}, _PLAIN)
        if self.max_tokens is None and self.min_tokens > max_tokens:
            raise VLLMValidationError(f"min_tokens={self.min_tokens}: expected at most {max_tokens}, which fit")
        return sampling.SamplingParams(
            temperature=0.0 if self.temperature < _GREEDY else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k or -1,
            min_p=self.min_p,
            max_tokens=min(self.max_tokens or max_tokens, max_tokens),
            min_tokens=min(self.min_tokens, max_tokens),
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=self.skip_special_tokens,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
        )


def _whole(value: Any) -> bool:
    return isinstance(value, int)


_PLAIN = {**{one.name: getattr(SamplingParams(), one.name) for one in fields(SamplingParams)}, "logprobs": None}
SamplingParams.__struct_fields__ = tuple(one.name for one in fields(SamplingParams))

for _each in (RequestOutputKind, SamplingParams):
    _each.__module__ = "vllm.sampling_params"
