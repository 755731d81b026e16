"""Sampling parameters: ours, and what each engine makes of them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lightrft.errors import ConfigError
from lightrft.strategy.plain_values import biases, integer, mapping, number, switch, texts, token_ids

__all__ = ["SamplingParams"]

_VLLM: Mapping[str, str | None] = {"logprobs": None}
"""Where vLLM's name differs from ours; ``None`` is translated by hand."""

_SGLANG: Mapping[str, str | None] = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "include_stop_str_in_output": "no_stop_trim",
    "logprobs": None,
}
"""The same of SGLang."""

_SYNONYMS = {theirs: ours for ours, theirs in _SGLANG.items() if theirs} | {"stop_strs": "stop"}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How completions are drawn, for every engine.

    The engine draws from softmax(logits / temperature), restricted to the ``top_k`` likeliest tokens, then to the
    smallest set of likeliest ones that has ``top_p`` of the probability, then to those at least ``min_p`` times as
    likely as the likeliest.

    Attributes:
        n: samples of each prompt.
        temperature: 0 takes the likeliest token, whatever the rest says; ``n`` is 1 then.
        top_p: above 0, at most 1.
        top_k: -1 for all tokens, which 0 becomes.
        min_p: 0 to 1.
        max_tokens: most tokens that are generated; ``generate_max_len`` of the settings if ``None``.
        min_tokens: no end before as many.
        seed: of all samples of a call; each prompt and sample gets one derived from it. The strategy draws one if
            ``None``, the same on all ranks of an engine.
        stop: texts that end a completion.
        stop_token_ids: tokens that end a completion, beside the end token of the model.
        ignore_eos: go on after the end token of the model.
        logprobs: return the log-prob of each token that was generated; of no other token.
        presence_penalty, frequency_penalty, repetition_penalty: as the engines define them; 0, 0 and 1 change nothing.
        skip_special_tokens, include_stop_str_in_output: what the text of a completion has.
        logit_bias: what is added to the logits of some tokens, by token id.
        options: entries of one engine only, by its own names.

    Raises:
        ConfigError: a value is of another type or out of its range, or ``options`` has an entry that is an attribute.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    max_tokens: int | None = None
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    logit_bias: Mapping[int, float] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = self._wrong_types() or self._wrong_values()
        if problems:
            raise ConfigError("sampling parameters: " + "; ".join(problems))

    def _wrong_types(self) -> list[str]:
        """What is of another type; everything else is kept as a plain value that nobody can change."""
        problems = []
        for name, plain, wanted in _PLAIN:
            value = getattr(self, name)
            try:
                object.__setattr__(self, name, plain(value))
            except (TypeError, ValueError, RuntimeError):
                problems.append(f"{name}={value!r:.100}: expected {wanted}, got {type(value).__name__}")
        if self.top_k == 0:
            object.__setattr__(self, "top_k", -1)
        return problems

    def _wrong_values(self) -> list[str]:
        problems = [
            f"{name}={getattr(self, name)!r}: expected {wanted}"
            for name, fits, wanted in (
                ("n", self.n >= 1, "at least 1"),
                ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
                ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
                ("top_k", self.top_k >= -1, "-1 for all tokens, or a number of tokens"),
                ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
                ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
                ("min_tokens", 0 <= self.min_tokens <= (self.max_tokens or self.min_tokens), "0 to max_tokens"),
            )
            if not fits
        ]
        if self.temperature == 0 and self.n > 1:
            problems.append(f"n={self.n} with temperature=0: all samples would be the same; use n=1")
        own = sorted(set(self.options) & _names())
        if own:
            problems.append(f"options has {', '.join(own)}, which are attributes: give them as such")
        return problems

    @classmethod
    def of(cls, given: Any) -> Self:
        """Ours, from ours, from a mapping, or from an object of vLLM or SGLang.

        In a mapping the names of both engines are understood (``max_new_tokens`` is ``max_tokens``); a name that is
        none of ours goes into ``options``. Of an engine's object the values that differ from the defaults of its class
        are taken, and its limit of tokens always; one of SGLang with ``top_k=1`` is greedy.

        Raises:
            ConfigError: ``given`` is something else, or has a value that is not allowed.
        """
        if isinstance(given, cls):
            return given
        if given is None:
            return cls()
        if isinstance(given, Mapping):
            return cls._from(given)
        root = type(given).__module__.partition(".")[0]
        if root == "vllm":
            return cls._from(_changed(given))
        if root == "sglang":
            return cls._from(_greedy(_changed(given)))
        raise ConfigError(
            f"sampling_params is a {type(given).__name__}: expected SamplingParams, a mapping, or an object of vLLM or "
            "SGLang"
        )

    @classmethod
    def _from(cls, entries: Mapping[str, Any]) -> Self:
        found: dict[str, Any] = {}
        options: dict[str, Any] = {}
        for name, value in entries.items():
            ours = _SYNONYMS.get(name, name)
            if ours in found and found[ours] != value:
                raise ConfigError(f"sampling parameters: {name} and {ours} mean the same: give one of them")
            (found if ours in _names() else options)[ours] = value
        own = found.pop("options", None) or {}
        found["logprobs"] = _asks_for_log_probs(found.get("logprobs"))
        return cls(**found, options={**own, **options} if isinstance(own, Mapping) else own)

    def to_vllm(self, cls: type[Any]) -> Any:
        """An object of vLLM's class ``cls`` (``vllm.SamplingParams``).

        Raises:
            ConfigError: vLLM has no such option.
        """
        given = self._translated("vLLM", _VLLM)
        if self.logprobs:
            given["logprobs"] = 0  # of the token that was drawn, without further ones
        return _made(cls, given, "vLLM")

    def to_sglang(self, cls: type[Any]) -> dict[str, Any]:
        """The mapping that SGLang takes; ``cls`` is its class of sampling parameters, which tells what there is.

        ``logprobs`` is not in it: ``Engine.generate`` takes it as ``return_logprob``.

        Raises:
            ConfigError: SGLang has no such option.
        """
        given = self._translated("SGLang", _SGLANG)
        _made(cls, given, "SGLang")
        return given

    def _translated(self, engine: str, names: Mapping[str, str | None]) -> dict[str, Any]:
        """What differs from our defaults, under the names of an engine."""
        given: dict[str, Any] = {}
        for each in dataclasses.fields(self):
            theirs = names.get(each.name, each.name)
            value = getattr(self, each.name)
            if theirs is None or each.name == "options" or value == each.default:
                continue
            given[theirs] = _as_engines_take_it(value)
        twice = sorted(set(self.options) & set(given))
        if twice:
            raise ConfigError(f"sampling parameters: {', '.join(twice)} is given twice for {engine}")
        return {**given, **self.options}


def _or(none: Any, plain: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: none if value is None else plain(value)


_KINDS: Mapping[Any, tuple[Callable[[Any], Any], str]] = {
    "int": (integer, "an integer"),
    "int | None": (_or(None, integer), "an integer or None"),
    "float": (number, "a number"),
    "bool": (switch, "True or False"),
    "tuple[str, ...]": (_or((), texts), "texts"),
    "tuple[int, ...]": (_or((), lambda ids: token_ids([ids] if isinstance(ids, int) else ids)), "token ids, integers"),
    "Mapping[int, float] | None": (_or(None, biases), "a mapping from token ids to numbers"),
    "Mapping[str, Any]": (mapping, "a mapping"),
}
"""By the type of a field: how its value is made a plain one, and what is expected."""

_PLAIN = [(each.name, *_KINDS[each.type]) for each in dataclasses.fields(SamplingParams)]


def _names() -> set[str]:
    return {each.name for each in dataclasses.fields(SamplingParams)}


def _as_engines_take_it(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _asks_for_log_probs(given: Any) -> bool:
    """Whether vLLM's ``logprobs`` asks for those of the tokens that are drawn: 0 does.

    Raises:
        ConfigError: it asks for those of other tokens.
    """
    if given is None or isinstance(given, bool):
        return bool(given)
    if given in (0, 1):
        return True
    raise ConfigError(
        f"sampling parameters: logprobs={given!r:.100}: expected True or False, or 0 or 1, which ask for the same as "
        "True: only the log-probs of the tokens that were drawn are returned"
    )


_LIMITS = ("max_tokens", "max_new_tokens")


def _changed(given: Any) -> dict[str, Any]:
    """What an engine's object says, where it differs from a new object of its class.

    The limit of tokens is taken always: that of a new object is not ours, and may have been given.
    """
    names = getattr(type(given), "__struct_fields__", None) or vars(given)
    plain = type(given)()
    return {
        name: getattr(given, name)
        for name in names
        if not name.startswith("_") and (name in _LIMITS or getattr(given, name) != getattr(plain, name, None))
    }


def _greedy(entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of SGLang's object, which makes ``top_k=1`` at temperature 1 of temperature 0: ``temperature=0`` again."""
    if entries.get("top_k") != 1:
        return entries
    return {**{name: value for name, value in entries.items() if name != "top_k"}, "temperature": 0.0}


def _made(cls: type[Any], given: Mapping[str, Any], engine: str) -> Any:
    known = inspect.signature(cls).parameters
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ConfigError(f"sampling parameters: {engine} has no {', '.join(unknown)}; it knows {', '.join(known)}")
    try:
        return cls(**given)
    except ConfigError:
        raise
    except Exception as error:  # engines have errors of their own, which inherit from nothing in particular
        raise ConfigError(f"sampling parameters: {engine} refuses them: {error}") from error
