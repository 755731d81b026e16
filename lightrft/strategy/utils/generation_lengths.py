"""How long completions are: collected over all ranks, plotted every few steps."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightrft.strategy.extras import naming_extras

__all__ = ["GenerationLengths"]


class GenerationLengths:
    """Collects lengths of completions, and plots them every few steps.

    A step is one call of ``gather_and_generate``. What is plotted are the completions of the last ``every`` steps, of
    all ranks: a histogram in ``log_dir/generation_lengths/step_00000010.png``, and the same for TensorBoard in
    ``log_dir/tensorboard``.

    Args:
        every: steps between two plots; 0 plots never, and collects nothing.
        log_dir: folder of the plots.

    Raises:
        ConfigError: a package for plots is missing.
    """

    def __init__(self, every: int, log_dir: str | None) -> None:
        self.step = 0
        self._every = every
        self._folder = Path(log_dir or ".")
        self._lengths: list[int] = []
        self._writer: Any = None
        if every:
            with naming_extras("plot_every"):
                for package in ("matplotlib", "tensorboard"):
                    importlib.import_module(package)

    def add(self, lengths: Iterable[int]) -> None:
        """The completions of one step, of this rank; any number, none included."""
        self.step += 1
        if self._every:
            self._lengths.extend(lengths)

    @property
    def is_due(self) -> bool:
        """Whether this step ends with a plot: the same on all ranks."""
        return bool(self._every) and self.step % self._every == 0

    def taken(self) -> list[int]:
        """The lengths that this rank has collected since the last plot; they are forgotten."""
        found, self._lengths = self._lengths, []
        return found

    def plot(self, lengths: list[int]) -> Path:
        """Write the plots of ``lengths``, those of all ranks; for one rank. Returns the file of the histogram."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.hist(lengths, bins=min(50, max(1, len(set(lengths)))))
        axes.set_xlabel("tokens of a completion")
        axes.set_ylabel("completions")
        mean = sum(lengths) / max(1, len(lengths))
        axes.set_title(
            f"step {self.step}: {len(lengths)} completions, mean {mean:.1f}, longest {max(lengths, default=0)}"
        )
        file = self._folder / "generation_lengths" / f"step_{self.step:08d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
        self._to_tensorboard(lengths, mean)
        return file

    def _to_tensorboard(self, lengths: list[int], mean: float) -> None:
        import numpy as np
        from torch.utils.tensorboard import SummaryWriter

        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder / "tensorboard"))
        self._writer.add_scalar("generation_length/mean", mean, self.step)
        self._writer.add_scalar("generation_length/max", max(lengths, default=0), self.step)
        if lengths:
            self._writer.add_histogram("generation_length", np.array(lengths), self.step)
        self._writer.flush()
