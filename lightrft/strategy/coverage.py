"""Whether the weights of an update are those of the checkpoint that an engine was started from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightrft.errors import WeightSyncError

if TYPE_CHECKING:
    import torch

    from lightrft.strategy.model_files import ModelFiles, Shape

__all__ = ["Coverage"]

_MOST_NAMED = 5


class Coverage:
    """Counts the weights of one update.

    Args:
        files: of the model. Where they do not tell names, only what comes twice is found.
    """

    def __init__(self, files: ModelFiles) -> None:
        self._shapes = files.shapes
        self._whole_numbers = files.whole_numbers
        self._optional = files.copies_of_the_embedding()
        self._seen: set[str] = set()
        self._problems: dict[str, list[str]] = {}

    def fits(self, name: str, shape: Shape, dtype: torch.dtype | None = None) -> bool:
        """Whether a weight may be loaded; if not, ``check`` will name it.

        Any floating-point dtype does, and no other one unless the checkpoint has whole numbers too.
        """
        if name in self._seen:
            self._note("sent twice", name)
            return False
        self._seen.add(name)
        if self._shapes is None:
            return True
        expected = self._shapes.get(name, self._optional.get(name))
        if expected is None:
            self._note("unexpected", name)
        elif expected != tuple(shape):
            self._note("of another shape", f"{name} {tuple(shape)}, expected {expected}")
        elif dtype is not None and not dtype.is_floating_point and name not in self._whole_numbers:
            self._note("of another dtype", f"{name} {dtype}, expected a floating-point one")
        else:
            return True
        return False

    def is_copy(self, name: str) -> bool:
        """Whether a weight that fits is the embedding once more, which the checkpoint has once."""
        return name in self._optional and name not in (self._shapes or ())

    def check(self, *, whole: bool = True) -> None:
        """All weights have come, and no others.

        Args:
            whole: whether all should have come by now.

        Raises:
            WeightSyncError: they have not; the message names them.
        """
        missing = set(self._shapes or ()) - set(self._optional) - self._seen if whole else ()
        for name in sorted(missing):
            self._note("missing", name)
        if self._problems:
            found = "; ".join(f"{kind}: {_some(names)}" for kind, names in self._problems.items())
            raise WeightSyncError(
                f"the weights that were sent are not those of the engine's model: {found}. Check that actor and engine "
                "are of the same model, and how names are mapped"
            )

    def _note(self, kind: str, what: str) -> None:
        self._problems.setdefault(kind, []).append(what)


def _some(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
