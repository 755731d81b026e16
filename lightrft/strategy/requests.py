"""What goes into an inference engine, and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightrft.errors import ConfigError

__all__ = ["Completion", "Request", "request_of", "requests_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt. It has token ids or text.

    Attributes:
        prompt_token_ids: the prompt as token ids, without padding; one image token for each image.
        prompt: the prompt as text.
        images: in the order of their places in the prompt.
        videos: the same.
    """

    prompt_token_ids: tuple[int, ...] | None = None
    prompt: str | None = None
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if (self.prompt_token_ids is None) == (self.prompt is None):
            raise ConfigError("a request needs prompt_token_ids or prompt, and not both")

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
    token_ids: Any = None, prompts: Any = None, images: Any = None, images_num: Any = None, videos: Any = None
) -> list[Request]:
    """Requests of the lists that a trainer has.

    Args:
        token_ids: one list of token ids for each prompt.
        prompts: or one text for each prompt.
        images: those of all prompts, one after the other if ``images_num`` is given; else one entry for each prompt:
            an image, a list of them, or ``None``.
        images_num: how many of ``images`` each prompt has.
        videos: one entry for each prompt: a video, a list of them, or ``None``.

    Raises:
        ConfigError: both or none of ``token_ids`` and ``prompts`` are given, or lengths do not fit.
    """
    if (token_ids is None) == (prompts is None):
        raise ConfigError("pass all_prompt_token_ids or all_prompts, and not both")
    if isinstance(prompts, str):
        raise ConfigError("all_prompts is one text: expected a list of texts")
    if images is None and images_num is not None and any(images_num):
        raise ConfigError(f"images_num asks for {sum(images_num)} images, and there are none")
    count = len(token_ids if prompts is None else prompts)
    pictures = _shared_out(images, images_num, count)
    films = _each("videos", videos, count)
    return [
        Request(
            prompt_token_ids=None if token_ids is None else tuple(int(token) for token in token_ids[index]),
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
    tokens = entry.get("prompt_token_ids")
    return Request(
        prompt_token_ids=None if tokens is None else tuple(int(token) for token in tokens),
        prompt=entry.get("prompt"),
        images=_several(media.get("image")),
        videos=_several(media.get("video")),
    )


def _shared_out(images: Any, images_num: Any, count: int) -> list[tuple[Any, ...]]:
    if images is None or images_num is None:
        return _each("all_images", images, count)
    if len(images_num) != count:
        raise ConfigError(f"images_num has {len(images_num)} entries for {count} prompts: expected one for each")
    flat = [image for entry in images for image in _several(entry)]
    if sum(images_num) != len(flat):
        raise ConfigError(f"images_num adds up to {sum(images_num)}, and there are {len(flat)} images")
    ends = [sum(images_num[: index + 1]) for index in range(count)]
    return [tuple(flat[end - number : end]) for number, end in zip(images_num, ends, strict=True)]


def _each(name: str, entries: Any, count: int) -> list[tuple[Any, ...]]:
    if entries is None:
        return [()] * count
    if len(entries) != count:
        raise ConfigError(
            f"{name} has {len(entries)} entries for {count} prompts: expected one for each, None where there is none, "
            "or images_num"
        )
    return [_several(entry) for entry in entries]


def _several(entry: Any) -> tuple[Any, ...]:
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, (list, tuple)) else (entry,)
