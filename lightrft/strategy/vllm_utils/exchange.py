"""Requests as vLLM takes them, and completions out of what it returns."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightrft.errors import ConfigError, EngineStateError
from lightrft.strategy.requests import Completion, Request

if TYPE_CHECKING:
    from lightrft.strategy.model_files import ModelFiles
    from lightrft.strategy.sampling import SamplingParams

__all__ = ["check_media", "check_tokens", "completions_of", "prompt_of", "sampling_for"]

_NEED_TEXT = ("stop", "bad_words")
"""What vLLM ignores without a tokenizer."""


def prompt_of(request: Request) -> dict[str, Any]:
    """One prompt for ``LLM.generate``."""
    prompt: dict[str, Any] = (
        {"prompt": request.prompt}
        if request.prompt_token_ids is None
        else {"prompt_token_ids": list(request.prompt_token_ids)}
    )
    media = {"image": list(request.images), "video": list(request.videos)}
    if any(media.values()):
        prompt["multi_modal_data"] = {kind: several for kind, several in media.items() if several}
    return prompt


def check_tokens(requests: Sequence[Request], vocabulary: int) -> None:
    """All token ids are in the vocabulary: without a tokenizer vLLM fails in the middle of a batch if one is not.

    Raises:
        ConfigError: one is not; the message names it.
    """
    for index, request in enumerate(requests):
        tokens = request.prompt_token_ids
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocabulary:
            outside = next(token for token in tokens if not 0 <= token < vocabulary)
            raise ConfigError(
                f"prompt {index} has the token id {outside}: expected ids of 0 to {vocabulary - 1}, the vocabulary of "
                "the engine's model"
            )


def check_media(requests: Sequence[Request], files: ModelFiles) -> None:
    """A prompt has one image token for each image, if it has any at all, and the same of videos.

    vLLM takes a token too many for text, and fails in the middle of a batch of one too few.

    Raises:
        ConfigError: there are more or fewer.
    """
    for index, request in enumerate(requests):
        for kind, token, media in (
            ("image", files.image_token, request.images),
            ("video", files.video_token, request.videos),
        ):
            count = (request.prompt_token_ids or ()).count(token) if token is not None else 0
            if count not in (0, len(media)):
                raise ConfigError(
                    f"prompt {index} has {count} {kind} tokens (id {token}) for {len(media)} {kind}s: expected one for "
                    "each, not expanded"
                )


def sampling_for(params: SamplingParams, seeds: Sequence[int], cls: type[Any], *, has_tokenizer: bool) -> list[Any]:
    """One object of vLLM's ``SamplingParams`` for each request. vLLM seeds sample i with the seed plus i.

    Args:
        params: of all of them; its seed is not used.
        seeds: one for each request.
        cls: ``vllm.SamplingParams``.
        has_tokenizer: whether the engine has one.

    Raises:
        ConfigError: vLLM refuses the parameters, or would ignore some.
    """
    plain = params.to_vllm(cls)
    ignored = [name for name in _NEED_TEXT if not has_tokenizer and getattr(plain, name, None)]
    if ignored:
        raise ConfigError(
            f"sampling parameters: {', '.join(ignored)} needs a tokenizer, and the engine was started without one "
            "(skip_tokenizer_init); use stop_token_ids"
        )
    if params.logprobs and hasattr(plain, "flat_logprobs"):  # in later versions
        plain.flat_logprobs = True
    return [_seeded(plain, seed) for seed in seeds]


def _seeded(plain: Any, seed: int) -> Any:
    own = copy.copy(plain)
    own.seed = seed
    return own


def completions_of(
    outputs: Sequence[Any], *, version: int, mode: Literal["raw", "processed"], has_tokenizer: bool
) -> Iterator[Completion]:
    """Completions in ``outputs`` of ``LLM.generate``, in order.

    Args:
        outputs: objects of ``vllm.RequestOutput``.
        version: of the weights.
        mode: of which distribution log-probs are.
        has_tokenizer: whether completions have text.

    Raises:
        EngineStateError: vLLM has given a completion up.
    """
    for output in outputs:
        for sample in output.outputs:
            tokens = tuple(sample.token_ids)
            yield Completion(
                prompt_token_ids=tuple(output.prompt_token_ids),
                output_token_ids=tokens,
                log_probs=_log_probs(sample.token_ids, sample.logprobs),
                log_probs_mode=mode,
                finish_reason=_reason(sample.finish_reason),
                weight_version=version,
                text=sample.text if has_tokenizer else None,
            )


def _log_probs(tokens: Sequence[int], steps: Any) -> tuple[float, ...] | None:
    if steps is None:
        return None
    flat = getattr(steps, "logprobs", ())
    if len(flat) == len(tokens) and steps.token_ids == tokens:  # without an object for each token
        return tuple(flat)
    return tuple(float(step[token].logprob) for token, step in zip(tokens, steps, strict=True))


def _reason(given: str | None) -> Literal["stop", "length"]:
    if given in (None, "abort", "error"):
        raise EngineStateError(f"vLLM gave a completion up: its finish reason is {given!r}")
    return "length" if given == "length" else "stop"
