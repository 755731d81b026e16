"""What goes into an inference engine, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from lightrft.errors import ConfigError
from lightrft.strategy.plain_values import integer, token_ids

__all__ = ["Completion", "Request", "request_of", "requests_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt. It has token ids or text. Lists that are given are kept as tuples.

    Attributes:
        prompt_token_ids: the prompt as token ids, without padding; one image token for each image.
        prompt: the prompt as text.
        images: in the order of their places in the prompt.
        videos: the same.

    Raises:
        ConfigError: token ids are no integers, the prompt is no text, or both or none of them are given.
    """

    prompt_token_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if (self.prompt_token_ids is None) == (self.prompt is None):
            raise ConfigError("a request needs prompt_token_ids or prompt, and not both")
        if not isinstance(self.prompt, str | None):
            raise ConfigError(f"the prompt {self.prompt!r:.100} is a {type(self.prompt).__name__}: expected a text")
        if self.prompt_token_ids is not None:
            object.__setattr__(self, "prompt_token_ids", _token_ids(self.prompt_token_ids))
        object.__setattr__(self, "images", _several(self.images))
        object.__setattr__(self, "videos", _several(self.videos))

    @classmethod
    def received(
        cls,
        prompt_token_ids: tuple[int, ...] | None,
        prompt: str | None,
        images: tuple[Any, ...],
        videos: tuple[Any, ...],
    ) -> Request:
        """One like a request of another rank: its values have been checked there."""
        request = object.__new__(cls)
        object.__setattr__(request, "prompt_token_ids", prompt_token_ids)
        object.__setattr__(request, "prompt", prompt)
        object.__setattr__(request, "images", images)
        object.__setattr__(request, "videos", videos)
        return request

    @property
    def is_tokens(self) -> bool:
        """Whether it is token ids and nothing else."""
        return self.prompt_token_ids is not None and not self.images and not self.videos


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What an engine made of one prompt, once for each sample.

    Attributes:
        prompt_token_ids: as the engine saw the prompt, image tokens expanded.
        output_token_ids: what it generated, the end token included if it came to one.
        log_probs: of each of ``output_token_ids``; ``None`` if they were not asked for.
        log_probs_mode: ``"raw"`` if they are of the model's distribution, ``"processed"`` if of the one that was drawn
            from: after penalties and temperature, with vLLM after top-k, top-p and min-p too.
        finish_reason: ``"stop"`` at an end token, ``"length"`` at the limit.
        weight_version: of the weights that generated it.
        text: if the engine has a tokenizer.
    """

    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    log_probs: tuple[float, ...] | None = None
    log_probs_mode: Literal["raw", "processed"] = "raw"
    finish_reason: Literal["stop", "length"] = "stop"
    weight_version: int = 0
    text: str | None = None


def requests_of(
    token_ids: Any = None,
    prompts: Any = None,
    images: Any = None,
    images_num: Any = None,
    videos: Any = None,
    videos_num: Any = None,
) -> list[Request]:
    """Requests of the lists that a trainer has.

    Args:
        token_ids: one list of token ids for each prompt.
        prompts: or one text for each prompt.
        images: those of all prompts, one after the other if ``images_num`` is given; else one entry for each prompt:
            an image, a list of them, or ``None``.
        images_num: how many of ``images`` each prompt has.
        videos: as ``images``; a video is one object, not a list of its frames.
        videos_num: how many of ``videos`` each prompt has.

    Raises:
        ConfigError: both or none of ``token_ids`` and ``prompts`` are given, lengths do not fit, or a prompt is neither
            a list of integers nor a text.
    """
    if (token_ids is None) == (prompts is None):
        raise ConfigError("pass all_prompt_token_ids or all_prompts, and not both")
    if isinstance(prompts, str):
        raise ConfigError("all_prompts is one text: expected a list of texts")
    if isinstance(token_ids, (str, bytes, Mapping)):
        raise ConfigError(
            f"all_prompt_token_ids is a {type(token_ids).__name__}: expected a list of lists of token ids"
        )
    count = len(token_ids if prompts is None else prompts)
    pictures = _shared_out("images", images, images_num, count)
    films = _shared_out("videos", videos, videos_num, count)
    return [
        Request(
            prompt_token_ids=None if token_ids is None else token_ids[index],
            prompt=None if prompts is None else prompts[index],
            images=pictures[index],
            videos=films[index],
        )
        for index in range(count)
    ]


def request_of(entry: Any) -> Request:
    """A request of what vLLM takes for one prompt; a request stays what it is.

    Args:
        entry: a mapping with ``prompt_token_ids`` or ``prompt``, and perhaps ``multi_modal_data`` with ``image`` and
            ``video``, each one or a list.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(entry, Request):
        return entry
    known = {"prompt_token_ids", "prompt", "multi_modal_data"}
    if not isinstance(entry, Mapping) or entry.keys() - known:
        raise ConfigError(
            f"expected a mapping with some of {', '.join(sorted(known))} for each prompt, got {entry!r:.200}"
        )
    media = entry.get("multi_modal_data") or {}
    return Request(
        prompt_token_ids=entry.get("prompt_token_ids"),
        prompt=entry.get("prompt"),
        images=media.get("image", ()),
        videos=media.get("video", ()),
    )


def _token_ids(given: Any) -> tuple[int, ...]:
    try:
        return token_ids(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"the prompt {given!r:.100} is no list of token ids: {error}") from error


def _shared_out(kind: str, media: Any, numbers: Any, count: int) -> list[tuple[Any, ...]]:
    """Images or videos by prompt."""
    if numbers is None:
        return _each(kind, media, count)
    numbers = _counts(kind, numbers)
    if media is None and any(numbers):
        raise ConfigError(f"{kind}_num asks for {sum(numbers)} {kind}, and there are none")
    if len(numbers) != count:
        raise ConfigError(f"{kind}_num has {len(numbers)} entries for {count} prompts: expected one for each")
    flat = [one for entry in media or () for one in _several(entry)]
    if sum(numbers) != len(flat):
        raise ConfigError(f"{kind}_num adds up to {sum(numbers)}, and there are {len(flat)} {kind}")
    return [tuple(flat[end - number : end]) for number, end in zip(numbers, accumulate(numbers), strict=True)]


def _counts(kind: str, numbers: Any) -> list[int]:
    try:
        found = [integer(number) for number in numbers]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{kind}_num={numbers!r:.100}: expected an integer for each prompt: {error}") from error
    if min(found, default=0) < 0:
        raise ConfigError(f"{kind}_num={numbers!r:.100}: expected 0 or more for each prompt")
    return found


def _each(kind: str, entries: Any, count: int) -> list[tuple[Any, ...]]:
    if entries is None:
        return [()] * count
    if len(entries) != count:
        raise ConfigError(
            f"all_{kind} has {len(entries)} entries for {count} prompts: expected one for each, None where there is "
            f"none, or {kind}_num"
        )
    return [_several(entry) for entry in entries]


def _several(entry: Any) -> tuple[Any, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, (list, tuple)) else (entry,)
