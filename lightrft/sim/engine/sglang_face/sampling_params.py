"""``sglang.srt.sampling.sampling_params``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from lightrft.sim.engine.lacking import RETURNED, Surface
from lightrft.strategy import sampling

__all__ = ["TOP_K_ALL", "SamplingParams"]

TOP_K_ALL = 1 << 30
"""All tokens."""

_GREEDY = 1e-6

FIELDS = Surface(
    engine="SGLang",
    honoured=frozenset(
        {
            "max_new_tokens", "stop", "stop_token_ids", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
            "presence_penalty", "repetition_penalty", "min_new_tokens", "n", "ignore_eos", "skip_special_tokens",
            "no_stop_trim", "logit_bias", "sampling_seed", "stop_strs",
        }
    ),
    idle={
        "stream_interval": RETURNED,
        "stop_str_max_len": "how far back texts that end a completion are looked for, which follows from them",
        "is_normalized": "whether other fields were worked out already",
    },
)  # fmt: skip
"""``sampling_seed`` counts with ``enable_deterministic_inference``, as in SGLang."""


@dataclass(kw_only=True)
class SamplingParams:
    """How completions are drawn. Fields and defaults are those of SGLang."""

    max_new_tokens: int | None = 128
    stop: Any = None
    stop_token_ids: Any = None
    stop_regex: Any = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = TOP_K_ALL
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    n: int = 1
    beam_width: int | None = None
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    stream_interval: int | None = None
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    custom_params: dict[str, Any] | None = None
    watermark: Any = None
    stop_strs: Any = None
    stop_regex_strs: Any = None
    stop_str_max_len: int = 0
    stop_regex_max_len: int = 0
    is_normalized: bool = False
    ebnf_full_assistant: bool = False

    __struct_fields__: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        self.stop_strs = self.stop if self.stop_strs is None else self.stop_strs
        self.stop_regex_strs = self.stop_regex if self.stop_regex_strs is None else self.stop_regex_strs
        self.stop_token_ids = set(self.stop_token_ids) if self.stop_token_ids else None
        if 0 <= self.temperature < _GREEDY:
            self.temperature, self.top_k = 1.0, 1
        if self.top_k == -1:
            self.top_k = TOP_K_ALL

    @property
    def texts(self) -> tuple[str, ...]:
        """Those that end a completion."""
        return (self.stop_strs,) if isinstance(self.stop_strs, str) else tuple(self.stop_strs or ())

    def verify(self, vocab_size: int) -> None:
        """Refuse values that are not allowed.

        Raises:
            ValueError: one is.
        """
        for name, fits, wanted in self._rules(vocab_size):
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected {wanted}")

    def _rules(self, vocab_size: int) -> Iterator[tuple[str, bool, str]]:
        most = math.inf if self.max_new_tokens is None else self.max_new_tokens
        bias = [int(token) for token in self.logit_bias or ()]
        yield "temperature", 0 <= self.temperature < math.inf, "a finite number, 0 or more"
        yield "top_p", 0 < self.top_p <= 1, "above 0, at most 1"
        yield "min_p", 0 <= self.min_p <= 1, "0 to 1"
        yield "top_k", self.top_k >= 1, "-1 for all tokens, or a number of tokens"
        yield "frequency_penalty", -2 <= self.frequency_penalty <= 2, "-2 to 2"
        yield "presence_penalty", -2 <= self.presence_penalty <= 2, "-2 to 2"
        yield "repetition_penalty", 0 < self.repetition_penalty <= 2, "above 0, at most 2"
        yield "max_new_tokens", most >= 0, "0 or more"
        yield "min_new_tokens", 0 <= self.min_new_tokens <= most, "0 to max_new_tokens"
        yield "logit_bias", all(0 <= token < vocab_size for token in bias), f"token ids below {vocab_size}"

    def ours(self, max_tokens: int) -> sampling.SamplingParams:
        """What the core understands; ``max_tokens`` is the most that fits.

        SGLang looks for no token that ends a completion if it is told ``ignore_eos``, whichever it is.

        Raises:
            ConfigError: something of it is lacking.
        """
        FIELDS.check({one.name: getattr(self, one.name) for one in fields(self)}, _PLAIN)
        greedy = self.top_k == 1
        most = max_tokens if self.max_new_tokens is None else min(self.max_new_tokens, max_tokens)
        return sampling.SamplingParams(
            temperature=0.0 if greedy else self.temperature,
            top_p=self.top_p,
            top_k=-1 if greedy or self.top_k == TOP_K_ALL else self.top_k,
            min_p=self.min_p,
            max_tokens=most,
            min_tokens=min(self.min_new_tokens, most),
            stop=self.texts,
            stop_token_ids=() if self.ignore_eos else tuple(sorted(self.stop_token_ids or ())),
            ignore_eos=self.ignore_eos,
            skip_special_tokens=False,  # in what ends a completion
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()} or None,
        )


_PLAIN = {one.name: getattr(SamplingParams(), one.name) for one in fields(SamplingParams)}
SamplingParams.__struct_fields__ = tuple(one.name for one in fields(SamplingParams))
SamplingParams.__module__ = "sglang.srt.sampling.sampling_params"
