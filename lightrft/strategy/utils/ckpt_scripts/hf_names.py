"""Names of weights in a training run, and those of the model that Hugging Face knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightrft.errors import CheckpointError, ConfigError
from lightrft.strategy.utils.ckpt_scripts.hf_reader import HFContents

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

__all__ = ["Names", "names_for"]


@dataclass(frozen=True, slots=True)
class Names:
    """How weights are called.

    Attributes:
        known_as: the name for Hugging Face, by the name in the run.
        outside: names of weights that are none of the model itself, such as the value head of a critic.
    """

    known_as: dict[str, str]
    outside: list[str]


def names_for(weights: Iterable[str], model: Path | None) -> Names:
    """Names for Hugging Face: those of the weights of ``model``, if it has some.

    A run may have trained a module around the model, so that all names of the model have a prefix there.

    Args:
        weights: names in the run.
        model: a folder of Hugging Face; ``None`` to leave the names as they are.

    Raises:
        ConfigError: the weights are of another model.
    """
    names = list(weights)
    expected = _names_in(model) if model is not None else []
    if not expected:
        return Names({name: name for name in names}, [])
    prefix = _prefix(names, expected)
    inside = {name: name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    missing = sorted(set(expected) - set(inside.values()) - _may_be_tied(expected))
    if missing:
        raise ConfigError(
            f"the source has no {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}, which {model} has; it "
            f"has {', '.join(sorted(names)[:5])} ...: pass the model that was trained, or leave --model out"
        )
    outside = [name for name in names if name not in inside]
    return Names(inside | {name: name for name in outside}, outside)


def _names_in(model: Path) -> list[str]:
    try:
        return [place.name for place in HFContents(model).specs]
    except CheckpointError:
        return []  # a folder with a configuration alone says nothing of names


def _may_be_tied(expected: list[str]) -> set[str]:
    """An output layer; a file may have it beside the embedding that it is."""
    return {name for name in expected if name.endswith("lm_head.weight")}


def _prefix(names: list[str], expected: list[str]) -> str:
    """What the names in the run begin with, for as many of the expected names as possible."""
    have = set(names)
    ends = [(name, one) for one in expected[:20] for name in names if name == one or name.endswith(f".{one}")]
    tried = {name.removesuffix(one) for name, one in ends}
    return max(sorted(tried, key=len), key=lambda prefix: sum(prefix + one in have for one in expected), default="")
