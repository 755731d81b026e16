"""Requests as SGLang takes them, and completions of what it returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from lightrft.errors import ConfigError, EngineStateError
from lightrft.strategy.request_seeds import content_of, seeds_for
from lightrft.strategy.requests import Completion, Request

if TYPE_CHECKING:
    from lightrft.strategy.model_files import ModelFiles
    from lightrft.strategy.sampling import SamplingParams

__all__ = ["arguments_of", "check_requests", "completion_of", "log_probs_mode", "with_seeds"]


def check_requests(requests: Sequence[Request], params: SamplingParams, files: ModelFiles, max_model_len: int) -> None:
    """Refuse what SGLang would die of, wait for without end, or pass over without a word.

    Raises:
        ConfigError: the message names the request by its place.
    """
    if params.ignore_eos and params.stop_token_ids:
        raise ConfigError("ignore_eos makes SGLang pass over stop_token_ids too: give one of them")
    for place, request in enumerate(requests):
        problem = _empty(request) or _of_tokens(request, params, files, max_model_len) or _of_media(request, files)
        if problem:
            raise ConfigError(f"request {place}: {problem}")


def _empty(request: Request) -> str | None:
    return None if request.prompt_token_ids or request.prompt else "the prompt is empty"


def _of_tokens(request: Request, params: SamplingParams, files: ModelFiles, max_model_len: int) -> str | None:
    tokens = request.prompt_token_ids
    if tokens is None:
        return "a text, and the model has no tokenizer" if files.has_tokenizer is False else None
    outside = [token for token in tokens if token < 0 or (files.vocab_size is not None and token >= files.vocab_size)]
    if outside:
        size = "" if files.vocab_size is None else f", below {files.vocab_size}"
        return f"token id {outside[0]}: expected 0 or more{size}"
    if len(tokens) + (params.max_tokens or 0) > max_model_len:
        return (
            f"{len(tokens)} tokens and max_tokens={params.max_tokens} are more than the {max_model_len} that the "
            "engine was set up for (prompt_max_len + generate_max_len)"
        )
    return None


def _of_media(request: Request, files: ModelFiles) -> str | None:
    if (request.images or request.videos) and files.sees is False:
        return "it has images or videos, and the model takes none"
    for kind, media, token in (
        ("image", request.images, files.image_token),
        ("video", request.videos, files.video_token),
    ):
        if token is None or request.prompt_token_ids is None:
            continue
        found = request.prompt_token_ids.count(token)
        if found != len(media):
            return (
                f"{found} {kind} tokens ({token}) for {len(media)} {kind}s: expected one for each, which the engine "
                "expands"
            )
    return None


def arguments_of(requests: Sequence[Request], *, log_probs: bool) -> dict[str, Any]:
    """Arguments of ``Engine.generate`` for requests that are all token ids, or all text; sampling parameters apart."""
    arguments: dict[str, Any] = {"return_logprob": log_probs}
    if requests[0].prompt is not None:
        arguments["prompt"] = [request.prompt for request in requests]
    else:
        arguments["input_ids"] = [list(request.prompt_token_ids or ()) for request in requests]
    if any(request.images for request in requests):
        arguments["image_data"] = [list(request.images) or None for request in requests]
    if any(request.videos for request in requests):
        arguments["video_data"] = [list(request.videos) or None for request in requests]
    return arguments


def with_seeds(
    requests: Sequence[Request], params: SamplingParams
) -> tuple[list[Request], list[SamplingParams] | SamplingParams]:
    """Each sample a request of its own, with a seed of its own (see ``seeds_for``), if ``params`` has one and draws."""
    if params.seed is None or params.temperature == 0:
        return list(requests), dataclasses.replace(params, seed=None)
    seeds = seeds_for([content_of(request) for request in requests], params.seed)
    each = [
        (request, seed + sample) for request, seed in zip(requests, seeds, strict=True) for sample in range(params.n)
    ]
    return [request for request, _ in each], [dataclasses.replace(params, n=1, seed=seed) for _, seed in each]


def log_probs_mode(params: SamplingParams, *, raw: bool) -> Literal["raw", "processed"]:
    """Which log-probs SGLang returns: those of logits / temperature, or of the logits if it was started for ``raw``.

    Top-k, top-p and min-p do not change them; penalties and biases do in either case.
    """
    plain = not (params.presence_penalty or params.frequency_penalty or params.logit_bias)
    untouched = plain and params.repetition_penalty == 1 and not params.options
    return "raw" if untouched and (raw or params.temperature in (0, 1)) else "processed"


def completion_of(
    request: Request, output: Mapping[str, Any], *, log_probs: Literal["raw", "processed"] | None, version: int
) -> Completion:
    """One completion of what the engine returned for ``request``.

    Args:
        request: whose prompt is taken if the engine does not tell it.
        output: one entry of what ``Engine.generate`` returns.
        log_probs: which ones were asked for, if any.
        version: of the weights.

    Raises:
        EngineStateError: the engine has given the request up, or does not tell how it expanded the prompt.
    """
    meta = output["meta_info"]
    reason = meta["finish_reason"]
    if reason["type"] not in ("stop", "length"):
        raise EngineStateError(f"SGLang gave a request up: {reason.get('message') or reason}")
    prompt = output.get("prompt_token_ids")
    if prompt is None and not request.is_tokens:
        raise EngineStateError(
            "this version of SGLang does not tell the tokens of a prompt with text, images or videos"
        )
    found = [entry[0] for entry in meta["output_token_logprobs"]] if log_probs else None
    return Completion(
        prompt_token_ids=tuple(prompt if prompt is not None else request.prompt_token_ids or ()),
        output_token_ids=tuple(output["output_ids"]),
        log_probs=None if found is None else tuple(found),
        log_probs_mode=log_probs or "raw",
        finish_reason=reason["type"],
        weight_version=version,
        text=output.get("text"),
    )
