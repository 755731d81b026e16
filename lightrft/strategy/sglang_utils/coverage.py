"""Whether the weights that are sent are those of the model, found out before the engine sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lightrft.errors import WeightSyncError

if TYPE_CHECKING:
    import torch

__all__ = ["Coverage"]

_MOST_NAMED = 5
_HEAD = "lm_head.weight"


class Coverage:
    """Keeps count of the weights of one update.

    SGLang passes over names that it does not know with some models, and dies of them with others; it dies of a wrong
    shape with all.

    Args:
        shapes: of the weights that are expected, by name; ``None`` checks only that none comes twice.
        tied: the output layer is the embedding: it may be sent or not.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] | None, *, tied: bool) -> None:
        self._shapes = shapes
        self._tied = tied
        self._seen: set[str] = set()

    def of_model(self, bucket: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, torch.Tensor]]:
        """The weights of ``bucket`` that the engine takes: all but an output layer that is the embedding.

        Raises:
            WeightSyncError: one is not expected, has another shape, or came before.
        """
        twice = []
        for name, _ in bucket:
            if name in self._seen:
                twice.append(name)
            self._seen.add(name)
        kept = [(name, tensor) for name, tensor in bucket if not self._is_copy(name)]
        problems = [f"sent twice: {_several(twice)}"] if twice else []
        if self._shapes is not None:
            unexpected = [name for name, _ in kept if name not in self._shapes]
            wrong = [
                f"{name} is {list(tensor.shape)} instead of {list(self._shapes[name])}"
                for name, tensor in kept
                if name in self._shapes and tuple(tensor.shape) != self._shapes[name]
            ]
            problems += [f"unexpected: {_several(unexpected)}"] if unexpected else []
            problems += [f"of the wrong shape: {_several(wrong)}"] if wrong else []
        self._raise(problems)
        return kept

    def check_complete(self) -> None:
        """Every weight that is expected has come.

        Raises:
            WeightSyncError: some have not.
        """
        missing = [name for name in self._shapes or () if name not in self._seen]
        missing = [name for name in missing if not (self._tied and name.endswith(_HEAD))]
        self._raise([f"missing: {_several(missing)}"] if missing else [])

    def _is_copy(self, name: str) -> bool:
        return self._tied and name.endswith(_HEAD) and self._shapes is not None and name not in self._shapes

    @staticmethod
    def _raise(problems: Sequence[str]) -> None:
        if problems:
            raise WeightSyncError(
                f"the weights that were sent are not those of the engine: {'; '.join(problems)}. Check that actor and "
                "engine are of the same model, and how names are mapped"
            )


def _several(names: Sequence[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
