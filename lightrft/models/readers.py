"""What reads prompts for a model: its tokenizer, or the processor of one that sees."""

from __future__ import annotations

from typing import Any

from lightrft.strategy.extras import naming_extras

__all__ = ["Reader", "reader_of"]


class Reader:
    """A tokenizer and an image processor, in place of a processor whose videos need torchvision.

    Attributes:
        tokenizer: of transformers.
        image_processor: the same.
    """

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    @property
    def chat_template(self) -> Any:
        """That of the tokenizer."""
        return self.tokenizer.chat_template

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As that of the tokenizer."""
        return self.tokenizer.apply_chat_template(*args, **kwargs)

    def save_pretrained(self, folder: str, **kwargs: Any) -> None:
        """Write both to ``folder``."""
        self.tokenizer.save_pretrained(folder, **kwargs)
        self.image_processor.save_pretrained(folder, **kwargs)


def reader_of(path: str) -> Any:
    """The processor of the model at ``path`` if it sees, else its tokenizer.

    Where torchvision is missing, which a processor needs for videos, a ``Reader``.
    """
    with naming_extras("reading prompts"):
        import transformers
    config: Any = transformers.AutoConfig.from_pretrained(path)
    if getattr(config, "vision_config", None) is None:
        return transformers.AutoTokenizer.from_pretrained(path)
    try:
        return transformers.AutoProcessor.from_pretrained(path)  # type: ignore[no-untyped-call, unused-ignore]
    except ImportError:
        images: Any = transformers.AutoImageProcessor
        return Reader(transformers.AutoTokenizer.from_pretrained(path), images.from_pretrained(path))
