"""What the core of the fake engine is asked for, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from lightrft.strategy.sampling import SamplingParams

__all__ = ["Drawn", "Medium", "Sample"]


@dataclass(frozen=True, slots=True)
class Medium:
    """An image or a video of a prompt.

    Attributes:
        kind: ``"image"`` or ``"video"``.
        digest: 64 bits that depend on its content.
        tokens: that it takes in a prompt.
        content: what the model makes of it.
    """

    kind: str
    digest: int
    tokens: int
    content: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion of one prompt, to be drawn.

    Attributes:
        tokens: of the prompt, one at least.
        params: how to draw; ``max_tokens`` is set.
        seed: 64 bits that choose among the completions that are possible; none counts where the temperature is 0.
        media: images and videos of the prompt.
        penalties: whose. Those of vLLM come after biases, and the one for repetition counts the prompt; those of SGLang
            come before, and count what was drawn.
    """

    tokens: tuple[int, ...]
    params: SamplingParams
    seed: int = 0
    media: tuple[Medium, ...] = ()
    penalties: Literal["vLLM", "SGLang"] = "vLLM"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A completion.

    Attributes:
        tokens: that were drawn, the one that ended it included.
        raw: log-prob of each by the distribution of the model.
        processed: the same by the one that it was drawn from.
        tempered: by the one after penalties and temperature, before anything is cut off.
        finish_reason: ``"stop"`` at a token or text that ends, ``"length"`` at ``max_tokens``.
        stop: the token or text of the parameters that ended it; ``None`` at the end token of the model.
    """

    tokens: tuple[int, ...]
    raw: tuple[float, ...]
    processed: tuple[float, ...]
    tempered: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    stop: int | str | None = None

    def __reduce__(self) -> Any:
        """Faster than what a dataclass with slots does by itself; batches of these go from rank to rank."""
        return _made, (self.tokens, self.raw, self.processed, self.tempered, self.finish_reason, self.stop)


def _made(tokens: Any, raw: Any, processed: Any, tempered: Any, finish_reason: Any, stop: Any) -> Drawn:
    return Drawn(tokens=tokens, raw=raw, processed=processed, tempered=tempered, finish_reason=finish_reason, stop=stop)
