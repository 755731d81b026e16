"""``vllm.inputs``: prompts as mappings."""

from typing import Any, NotRequired, TypedDict

__all__ = ["TextPrompt", "TokensPrompt"]


class _Options(TypedDict):
    """What may be beside any prompt."""

    multi_modal_data: NotRequired[dict[str, Any] | None]
    media_io_kwargs: NotRequired[dict[str, dict[str, Any]] | None]
    mm_processor_kwargs: NotRequired[dict[str, Any] | None]
    multi_modal_uuids: NotRequired[dict[str, Any]]
    cache_salt: NotRequired[str]


class TextPrompt(_Options):
    """A text."""

    prompt: str


class TokensPrompt(_Options):
    """Token ids, and the text they are of."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    token_type_ids: NotRequired[list[int]]
    prompt_token_offsets: NotRequired[list[tuple[int, int]] | None]


for _each in (TextPrompt, TokensPrompt):
    _each.__module__ = "vllm.inputs.llm"
