"""What the core of the fake engine needs of a model, whatever it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lightrft.errors import WeightSyncError
from lightrft.sim.engine.media import media_digest
from lightrft.sim.engine.samples import Medium

if TYPE_CHECKING:
    from torch import Size, Tensor

    from lightrft.sim.engine.samples import Drawn, Sample
    from lightrft.strategy.sampling import SamplingParams

__all__ = ["LanguageModel"]

_TOKENS = 4
"""That an image or a video takes in a model that does not see them."""


class LanguageModel(ABC):
    """Weights, and what is drawn with them.

    Attributes:
        vocabulary: how many tokens there are.
        ends: tokens that end a completion.
        decode: tokens to text, for texts that end a completion; ``None`` if there is no tokenizer.
    """

    vocabulary: int
    ends: frozenset[int]
    decode: Callable[..., str] | None = None

    @abstractmethod
    def shapes(self) -> Mapping[str, Size]:
        """Names and shapes of the weights that a checkpoint of the model has; empty if they are not known."""

    @abstractmethod
    def optional(self) -> frozenset[str]:
        """Names that a checkpoint may have or not: weights that are tied to others."""

    @abstractmethod
    def put(self, name: str, tensor: Tensor) -> None:
        """Copy one weight in; its name and shape fit."""

    @abstractmethod
    def drop(self) -> None:
        """Destroy the weights: whatever is computed before they are put in again is NaN, or an error."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of all weights as they were put in."""

    @abstractmethod
    def forget(self) -> None:
        """Empty the prefix cache."""

    @abstractmethod
    def forget_media(self) -> None:
        """Empty the encoder cache."""

    @abstractmethod
    def draw(self, samples: Sequence[Sample]) -> list[Drawn]:
        """A completion of each of ``samples``, which depends on the weights and on that sample alone."""

    def stop_in(self, drawn: Sequence[int], params: SamplingParams) -> str | None:
        """The text of ``params.stop`` that the last token completes, the earliest one; ``None`` if there is none."""
        if not params.stop or self.decode is None:
            return None
        text, before = (
            self.decode(tokens, skip_special_tokens=params.skip_special_tokens) for tokens in (drawn, drawn[:-1])
        )
        places = {stop: text.find(stop, max(0, len(before) - len(stop) + 1)) for stop in params.stop}
        ends = {stop: place + len(stop) for stop, place in places.items() if place >= 0}
        return min(ends, key=lambda stop: ends[stop], default=None)

    def medium(self, kind: str, given: Any) -> Medium:
        """An image or a video as the model takes it.

        Args:
            kind: ``"image"`` or ``"video"``.
            given: of whatever type.
        """
        return Medium(kind, media_digest(given), _TOKENS)

    def module(self) -> nn.Module:
        """What computes, as far as it is a module."""
        return nn.Module()

    def load(self, weights: Iterable[tuple[str, Tensor]], *, whole: bool = True) -> None:
        """Put weights in.

        Args:
            weights: by the names of a checkpoint.
            whole: whether all have to be there.

        Raises:
            WeightSyncError: one is unknown or has another shape, or one is missing. Those before it are in.
        """
        known, optional = self.shapes(), self.optional()
        seen = set()
        for name, tensor in weights:
            if known and name not in known and name in optional:
                continue  # what it is tied to comes too
            if known and name not in known:
                raise WeightSyncError(f"{name} is no weight of this model, which has {_some(known)}")
            if known and tensor.shape != known[name]:
                raise WeightSyncError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(known[name])}")
            self.put(name, tensor)
            seen.add(name)
            del tensor  # the next may be gathered only when it is gone
        missing = [name for name in known if name not in seen and name not in optional]
        if whole and missing:
            raise WeightSyncError(f"{len(missing)} weights are missing: {_some(missing)}")


def _some(names: Iterable[str]) -> str:
    several = list(names)
    more = f" and {len(several) - 3} more" if len(several) > 3 else ""
    return ", ".join(several[:3]) + more
