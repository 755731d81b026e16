"""Prompts of a file, as text and token ids."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import Dataset

from lightrft.datasets import records
from lightrft.datasets.prompts import Prompt
from lightrft.errors import ConfigError
from lightrft.strategy.extras import naming_extras
from lightrft.strategy.utils.printing import print_from_first

__all__ = ["PromptDataset"]

PLACEHOLDER = "<image>"
"""Where in a text an image belongs; without any, images come before the text."""


class PromptDataset(Dataset[Prompt]):
    """Prompts in the order of their records, each read and tokenized once.

    The same file and settings give the same prompts, so ``strategy.setup_dataloader(dataset, ...,
    collate_fn=collate, consumed_samples=...)`` goes on exactly where a run stopped, and gives the ranks that share a
    sequence the same ones.

    Args:
        found: records, and where each is, for messages.
        tokenizer: of transformers, or a processor.
        input_key: field of the prompt: a text, or a list of messages with ``role`` and ``content``.
        label_key: field of the label; ``None`` for none.
        images_key: field of the images of a prompt, one or a list: paths, relative to ``folder``, bytes, or anything
            that the model's processor takes; it may be missing in a record. ``None`` for none.
        system_prompt: message that comes first, where a record has none; needs the chat template.
        apply_chat_template: write the prompt as the tokenizer's chat template does, up to the answer.
        max_length: most tokens of a prompt; ``None`` for any. An image counts as one.
        too_long: ``"drop"`` prompts that have more, or ``"cut"`` them at their beginning; those with images are always
            dropped. A line says how many.
        folder: what paths of images are relative to.
        tell: gets that line; it is printed on rank 0 if ``None``.

    Raises:
        ConfigError: a record lacks a field or has the wrong thing in it (the message says where), settings contradict
            each other, or no prompt is left.
    """

    def __init__(
        self,
        found: Iterable[tuple[str, Mapping[str, Any]]],
        tokenizer: Any,
        *,
        input_key: str = "prompt",
        label_key: str | None = None,
        images_key: str | None = None,
        system_prompt: str | None = None,
        apply_chat_template: bool = False,
        max_length: int | None = None,
        too_long: Literal["drop", "cut"] = "drop",
        folder: str | Path = ".",
        tell: Callable[[str], None] | None = None,
    ) -> None:
        if too_long not in {"drop", "cut"}:
            raise ConfigError(f"too_long={too_long!r}: expected 'drop' or 'cut'")
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length={max_length}: expected 1 at least, or None for prompts of any length")
        if system_prompt is not None and not apply_chat_template:
            raise ConfigError(
                "system_prompt needs apply_chat_template=True: apply it, or put the prompt into the texts"
            )
        self._folder = Path(folder)
        fields = _Fields(input_key, label_key, images_key)
        writer = _Writer(tokenizer, system_prompt, apply_chat_template=apply_chat_template)
        every = [writer.prompt(where, fields, record, index) for index, (where, record) in enumerate(found)]
        self._prompts, line = _fitting(every, max_length, too_long, writer)
        if line:
            (tell or _tell)(line)
        if not self._prompts:
            raise ConfigError(f"no prompt is left of {len(every)}: {line or 'the file is empty'}")

    @classmethod
    def from_file(cls, path: str | Path, tokenizer: Any, *, split: str = "train", **settings: Any) -> PromptDataset:
        """The prompts at ``path``; see ``records.read`` and the class for the arguments."""
        source = Path(path)
        folder = source if source.is_dir() else source.parent
        return cls(records.read(source, split=split), tokenizer, **{"folder": folder, **settings})

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, place: int) -> Prompt:
        found = self._prompts[place]
        if not found.images:
            return found
        images = tuple(_opened(one, self._folder) for one in found.images)
        return replace(found, images=images)


@dataclass(frozen=True, slots=True)
class _Fields:
    """Which fields of a record are read."""

    input: str
    label: str | None
    images: str | None

    def of(self, where: str, record: Mapping[str, Any]) -> tuple[Any, Any, tuple[Any, ...]]:
        """The prompt, the label and the images of a record."""
        for name in (self.input, self.label):
            if name is not None and name not in record:
                raise ConfigError(f"{where}: no field {name!r}: the record has {', '.join(record)}")
        images = None if self.images is None else record.get(self.images)
        several = images if isinstance(images, (list, tuple)) else [] if images is None else [images]
        return record[self.input], None if self.label is None else record[self.label], tuple(several)


class _Writer:
    """Writes prompts as text and token ids."""

    def __init__(self, tokenizer: Any, system_prompt: str | None, *, apply_chat_template: bool) -> None:
        self._reader = tokenizer
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._system = system_prompt
        self._applies = apply_chat_template
        if apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
            raise ConfigError(
                f"apply_chat_template=True, and {type(tokenizer).__name__} has no chat template: set its chat_template"
            )

    def prompt(self, where: str, fields: _Fields, record: Mapping[str, Any], index: int) -> Prompt:
        """The prompt of a record."""
        given, label, images = fields.of(where, record)
        if self._applies:
            messages = self._messages(where, fields.input, given, len(images))
            text = self._reader.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        elif isinstance(given, str):
            text = given
        else:
            raise ConfigError(f"{where}: {fields.input!r} is {type(given).__name__}: expected a text, {_ELSE}")
        if not text:
            raise ConfigError(f"{where}: {fields.input!r} is empty: expected a prompt")
        ids = self._tokenizer.encode(text, add_special_tokens=not self._applies)
        return Prompt(prompt=text, token_ids=tuple(ids), label=label, images=images, index=index)

    def cut(self, prompt: Prompt, length: int) -> Prompt:
        """The last ``length`` tokens of ``prompt``."""
        ids = prompt.token_ids[-length:]
        return replace(prompt, prompt=self._tokenizer.decode(list(ids)), token_ids=ids)

    def _messages(self, where: str, name: str, given: Any, images: int) -> list[Any]:
        if isinstance(given, str):
            messages = [{"role": "user", "content": _content(where, given, images)}]
        elif _are_messages(given):
            messages = list(given)
        else:
            raise ConfigError(f"{where}: {name!r} is {given!r:.80}: expected a text, or messages with role and content")
        if self._system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self._system}, *messages]


_ELSE = "or apply_chat_template=True for messages"


def _are_messages(given: Any) -> bool:
    return (
        isinstance(given, Sequence)
        and bool(given)
        and all(isinstance(one, Mapping) and {"role", "content"} <= one.keys() for one in given)
    )


def _content(where: str, text: str, images: int) -> Any:
    """The text with places for its images."""
    if not images:
        return text
    parts = text.split(PLACEHOLDER)
    if len(parts) == 1:
        parts = [""] * images + parts
    if len(parts) != images + 1:
        raise ConfigError(f"{where}: {images} images and {len(parts) - 1} {PLACEHOLDER} in the text: expected as many")
    found: list[Any] = []
    for number, part in enumerate(parts):
        found += [{"type": "image"}] if number else []
        found += [{"type": "text", "text": part}] if part else []
    return found


def _fitting(prompts: list[Prompt], length: int | None, way: str, writer: _Writer) -> tuple[list[Prompt], str | None]:
    """Prompts of at most ``length`` tokens, and what is to be said about the others."""
    longer = [one for one in prompts if length is not None and len(one.token_ids) > length]
    if not longer or length is None:
        return prompts, None
    cut = {one.index: writer.cut(one, length) for one in longer if way == "cut" and not one.images}
    dropped = {one.index for one in longer} - cut.keys()
    counts = [f"{len(some)} {what}" for some, what in ((dropped, "dropped"), (cut, "cut")) if some]
    line = f"{len(longer)} of {len(prompts)} prompts have more than {length} tokens: {', '.join(counts)}"
    return [cut.get(one.index, one) for one in prompts if one.index not in dropped], line


def _opened(image: Any, folder: Path) -> Any:
    """An image of a path or of bytes, also in the form of the package ``datasets``; anything else as it is."""
    if isinstance(image, Mapping) and {"bytes", "path"} >= image.keys():
        image = image.get("bytes") or image.get("path")
    if not isinstance(image, (str, os.PathLike, bytes)):
        return image
    with naming_extras("reading images"):
        from PIL import Image
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else folder / image) as opened:
        return opened.convert("RGB")


def _tell(line: str) -> None:
    import torch.distributed as dist

    print_from_first(dist.get_rank() if dist.is_initialized() else 0, line)
