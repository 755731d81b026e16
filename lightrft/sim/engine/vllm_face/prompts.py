"""Prompts as vLLM takes them: text, token ids, or a mapping with images and videos beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightrft.errors import ConfigError
from lightrft.sim.engine.lacking import lacks
from lightrft.sim.engine.media import expanded
from lightrft.sim.engine.vllm_face.exceptions import VLLMValidationError

if TYPE_CHECKING:
    from lightrft.sim.engine.samples import Drawn, Medium

__all__ = ["Prompt", "Prompts", "media_limits"]

_KEYS = frozenset({"prompt", "prompt_token_ids", "multi_modal_data"})
_MOST_MEDIA = 999
"""Of one kind in a prompt, where ``limit_mm_per_prompt`` does not say."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, image tokens expanded."""

    tokens: tuple[int, ...]
    text: str | None
    media: tuple[Medium, ...]


class Prompts:
    """Reads prompts, and refuses those that cannot be completed.

    Args:
        tokenizer: of transformers, if there is one.
        vocabulary: how many tokens there are.
        limit: most tokens of prompt and completion.
        config: of the model; its ``image_token_id`` and ``video_token_id`` stand for images and videos.
        media_limits: most images and videos of a prompt.
        medium: see ``LanguageModel``.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: int,
        limit: int,
        config: Mapping[str, Any],
        media_limits: Mapping[str, int],
        medium: Callable[[str, Any], Medium],
    ) -> None:
        self.tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._limit = limit
        self._media_limits = media_limits
        self._medium = medium
        self._media_tokens = {
            kind: token for kind in ("image", "video") if (token := config.get(f"{kind}_token_id")) is not None
        }

    def read(self, given: Any) -> list[Prompt]:
        """The prompts in ``given``: one, or several in a sequence.

        Raises:
            TypeError: one is no text, no list of integers and no mapping.
            VLLMValidationError: one is empty, too long, or has tokens that there are not.
        """
        one = isinstance(given, (str, dict)) or (isinstance(given, list) and given and isinstance(given[0], int))
        return [self._read(each) for each in ([given] if one else given)]

    def _read(self, given: Any) -> Prompt:
        if isinstance(given, str):
            given = {"prompt": given}
        elif isinstance(given, list):
            given = {"prompt_token_ids": given}
        elif not isinstance(given, dict):
            raise TypeError(f"a prompt is a {type(given).__name__}: expected a text, a list of integers or a mapping")
        if lacking := sorted(key for key in given.keys() - _KEYS if given[key] is not None):
            raise ConfigError(lacks("vLLM", f"{', '.join(lacking)} in a prompt"))
        text, tokens = given.get("prompt"), given.get("prompt_token_ids")
        if tokens is not None and not (
            isinstance(tokens, list) and all(issubclass(one, int) for one in set(map(type, tokens)))
        ):
            raise TypeError(f"prompt_token_ids is a {type(tokens).__name__}: expected a list of integers")
        if tokens is None:
            if not isinstance(text, str):
                raise TypeError(f"a prompt has the text {text!r}: expected a text, or prompt_token_ids")
            if self.tokenizer is None:
                raise VLLMValidationError("a prompt is text, and there is no tokenizer: pass prompt_token_ids")
            tokens = self.tokenizer.encode(text)
        media, seen = self._media(given.get("multi_modal_data") or {}, tuple(tokens))
        self._check(seen)
        return Prompt(seen, text, media)

    def _media(self, given: Mapping[str, Any], tokens: tuple[int, ...]) -> tuple[tuple[Medium, ...], tuple[int, ...]]:
        """Images and videos, and the tokens with one expanded for each."""
        found: list[Medium] = []
        for kind, entries in given.items():
            if kind not in self._media_tokens:
                raise VLLMValidationError(f"this model takes no {kind}: its configuration has no {kind}_token_id")
            several = entries if isinstance(entries, (list, tuple)) else [entries]
            token = self._media_tokens[kind]
            most = self._media_limits.get(kind, _MOST_MEDIA)
            if len(several) > most:
                raise VLLMValidationError(f"{len(several)} {kind}s in a prompt: limit_mm_per_prompt allows {most}")
            if tokens.count(token) != len(several):
                raise VLLMValidationError(
                    f"the prompt has {tokens.count(token)} {kind} tokens for {len(several)} {kind}s: expected one each"
                )
            media = [self._medium(kind, one) for one in several]
            tokens = expanded(tokens, token, [one.tokens for one in media])
            found += media
        return tuple(found), tokens

    def _check(self, tokens: tuple[int, ...]) -> None:
        if not tokens:
            raise VLLMValidationError("a prompt is empty")
        if len(tokens) >= self._limit:
            raise VLLMValidationError(
                f"a prompt of {len(tokens)} tokens leaves no room for a completion: max_model_len is {self._limit}"
            )
        if not 0 <= min(tokens) <= max(tokens) < self._vocabulary:
            raise VLLMValidationError(f"a prompt has a token outside of the vocabulary of {self._vocabulary}")

    def text_of(self, drawn: Drawn, params: Any) -> str:
        """The text of a completion, without the token or text that ended it; empty without a tokenizer."""
        if self.tokenizer is None:
            return ""
        ended, kept = drawn.finish_reason == "stop", params.include_stop_str_in_output
        by_text = isinstance(drawn.stop, str)
        tokens = drawn.tokens[:-1] if ended and not by_text and not kept else drawn.tokens
        text: str = self._decode(tokens, params)
        if isinstance(drawn.stop, str):
            before = len(self._decode(drawn.tokens[:-1], params))
            end = text.index(drawn.stop, max(0, before - len(drawn.stop) + 1))
            text = text[: end + (len(drawn.stop) if kept else 0)]
        return text

    def _decode(self, tokens: Sequence[int], params: Any) -> str:
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=params.skip_special_tokens)
        return text


def media_limits(given: Any) -> dict[str, int]:
    """``limit_mm_per_prompt`` as numbers by kind.

    Raises:
        ConfigError: it says more than numbers.
    """
    limits = dict(given or {})
    if not all(isinstance(most, int) and kind in ("image", "video") for kind, most in limits.items()):
        raise ConfigError(lacks("vLLM", f"limit_mm_per_prompt={given!r} but numbers of images and videos"))
    return limits


def _are_integers(tokens: list[Any]) -> bool:
    return all(issubclass(kind, int) for kind in set(map(type, tokens)))
