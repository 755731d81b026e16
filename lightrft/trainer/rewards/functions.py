"""Rewards by a Python function."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightrft.errors import ConfigError, RewardError
from lightrft.trainer.function_names import lacks, parts
from lightrft.trainer.rewards.source import Rewards, RewardSource, Scored, scores_of

__all__ = ["FunctionReward", "load_function"]


class FunctionReward(RewardSource):
    """Asks ``function(prompts, responses, labels)``: three lists of equal length, of texts and of what data sets hold.

    It returns a number for each, or a mapping with such lists: ``reward`` is what counts, others (``accuracy``) are
    reported. It is not called without samples.

    Args:
        function: or ``"path/to/file.py:function"``, or ``"package.module:function"``.
        name: by which it is reported; its own if ``None``.
    """

    def __init__(self, function: Callable[..., Any] | str, name: str | None = None) -> None:
        self._function = load_function(function) if isinstance(function, str) else function
        self.name = name or str(getattr(self._function, "__name__", type(self._function).__name__))

    def __call__(self, samples: Scored) -> Rewards:
        """See ``RewardSource``."""
        if not samples:
            return scores_of([], 0, self.name)
        columns = [[getattr(one, name) for one in samples] for name in ("prompt", "response", "label")]
        try:
            answer = self._function(*columns)
        except Exception as error:
            raise RewardError(f"the reward function {self.name} raised {type(error).__name__}: {error}") from error
        return scores_of(answer, len(samples), f"the reward function {self.name}")


def load_function(where: str) -> Callable[..., Any]:
    """The function that ``"path/to/file.py:function"`` or ``"package.module:function"`` names.

    Raises:
        ConfigError: there is none, or importing it failed.
    """
    place, name = parts(where)
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:
        raise ConfigError(f"{where!r}: importing {place} raised {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise lacks(place, name, [each for each, value in vars(module).items() if callable(value)])
    return found  # type: ignore[no-any-return]


def _from_file(file: Path) -> Any:
    if not file.is_file():
        raise ConfigError(f"{file} is no file")
    name = f"_reward_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses of the file look for their module here
    spec.loader.exec_module(module)
    return module
