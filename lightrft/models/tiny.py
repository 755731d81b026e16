"""Tiny random models with a tokenizer of letters, for tests and demonstrations: made in a second, loaded by everything.

    python -m lightrft.models.tiny FOLDER [--vision] [--seed SEED]

What is written is a Hugging Face checkpoint like any other. Heads have the size 32, the smallest that vLLM takes.
Weights are spread so widely that the likeliest token stands out, and no two seeds give the same ones, norms and biases
included.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

__all__ = [
    "EOS",
    "IMAGE",
    "LETTERS",
    "PAD",
    "SPECIAL",
    "VIDEO",
    "VISION_END",
    "VISION_START",
    "VOCABULARY",
    "image_processor",
    "text_model",
    "tiny_text_model",
    "tiny_vision_model",
    "tokenizer",
    "vision_model",
    "vision_processor",
]

VOCABULARY = 128
"""Token ids that the models know. Those after the last letter stand for nothing."""

SPECIAL = ("<pad>", "<eos>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PAD, EOS, VISION_START, VISION_END, IMAGE, VIDEO = range(len(SPECIAL))
LETTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
"""The letter of each token id after the special ones."""

_SPREAD = 0.2

_SIZE = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
"""Pixels of an image, at least and at most. Each 28 x 28 of them become a token."""

_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}{% else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>
{%- else %}{{ part['text'] }}{% endif -%}
{%- endfor -%}
{%- endif %}<eos>
{%- endfor -%}
{%- if add_generation_prompt %}assistant: {% endif -%}
"""


def tiny_text_model(folder: str | Path, seed: int = 0, **settings: Any) -> Any:
    """Write a random Qwen2 and its tokenizer to ``folder``, and return the model.

    Args:
        folder: is made.
        seed: of the weights.
        settings: of ``Qwen2Config``, in place of ours.
    """
    return _written(folder, text_model(seed, **settings), tokenizer())


def tiny_vision_model(folder: str | Path, seed: int = 0, **settings: Any) -> Any:
    """Write a random Qwen2-VL, which sees images and videos, and its processor to ``folder``; return the model.

    Where torchvision is missing, the tokenizer and the image processor are written in place of the processor.

    Args:
        folder: is made.
        seed: of the weights.
        settings: of the text part's configuration, in place of ours.
    """
    readers = [vision_processor()] if _has_torchvision() else [tokenizer(), image_processor()]
    return _written(folder, vision_model(seed, **settings), *readers)


def text_model(seed: int = 0, **settings: Any) -> Any:
    """The model of ``tiny_text_model``: two layers of two heads, in fp32."""
    transformers = _transformers()
    config = transformers.Qwen2Config(**_text_settings(**settings))
    return _random(lambda: transformers.Qwen2ForCausalLM(config), seed)


def vision_model(seed: int = 0, **settings: Any) -> Any:
    """The model of ``tiny_vision_model``: the text model with two layers that see."""
    transformers = _transformers()
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = _text_settings(**{"rope_parameters": rope, **settings})
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config={"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2, "in_chans": 3},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    return _random(lambda: transformers.Qwen2VLForConditionalGeneration(config), seed)


def tokenizer() -> Any:
    """One token for each letter of ``LETTERS``, none for any other, and a chat template: role, colon, content, end."""
    from tokenizers.pre_tokenizers import ByteLevel

    as_bytes: Any = ByteLevel(add_prefix_space=False, use_regex=False)
    letters = ["".join(part for part, _ in as_bytes.pre_tokenize_str(letter)) for letter in LETTERS]
    return _transformers().Qwen2Tokenizer(
        vocab={token: number for number, token in enumerate([*SPECIAL, *letters])},
        merges=[],
        unk_token=None,
        pad_token=SPECIAL[PAD],
        eos_token=SPECIAL[EOS],
        extra_special_tokens=list(SPECIAL[EOS + 1 :]),
        chat_template=_TEMPLATE,
    )


def image_processor() -> Any:
    """What turns images into inputs of ``vision_model``: that of torchvision, or of PIL where there is none."""
    transformers = _transformers()
    kind = transformers.Qwen2VLImageProcessor if _has_torchvision() else transformers.Qwen2VLImageProcessorPil
    return kind(size=_SIZE)


def vision_processor() -> Any:
    """What turns text, images and videos into inputs of ``vision_model``; transformers needs torchvision for it."""
    transformers = _transformers()
    return transformers.Qwen2VLProcessor(
        image_processor=image_processor(),
        tokenizer=tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(size=_SIZE),
        chat_template=_TEMPLATE,
    )


def _transformers() -> Any:
    return importlib.import_module("transformers")


def _has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def _text_settings(**settings: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": _SPREAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        **settings,
    }


def _random(build: Any, seed: int) -> Any:
    """What ``build`` gives, with weights that ``seed`` alone determines; the caller's random state stays."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build().eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # else norms are ones and biases zeros, whatever the seed
                parameter.add_(torch.randn_like(parameter), alpha=_SPREAD)
    return model


def _written(folder: str | Path, model: Any, *readers: Any) -> Any:
    for each in (model, *readers):
        each.save_pretrained(folder)
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m lightrft.models.tiny", description="Write a tiny random model.")
    parser.add_argument("folder", help="where the checkpoint is written")
    parser.add_argument("--vision", action="store_true", help="one that sees images (Qwen2-VL)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    given = parser.parse_args(arguments)
    (tiny_vision_model if given.vision else tiny_text_model)(given.folder, given.seed)


if __name__ == "__main__":
    main()
