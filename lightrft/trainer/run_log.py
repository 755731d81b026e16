"""What people see of a run: a line for each iteration, files for programs, curves, and a progress bar."""

from __future__ import annotations

import datetime as dt
import importlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from lightrft.strategy.extras import naming_extras
from lightrft.trainer.metrics import now

__all__ = ["RunLog", "summary_line"]

_FILE = "metrics.jsonl"
_CURVES = ("reward", "accuracy")


class RunLog:
    """Writes the metrics of iterations; one rank has it.

    In ``log_dir`` there are ``metrics.jsonl``, with a line of JSON for each iteration, ``tensorboard``, and at the end
    ``reward.png`` (and ``accuracy.png``, if a reward reports ``accuracy``). A run that is resumed goes on in the same
    files, from where its checkpoint was: later lines are taken out. One that begins anew begins them anew.

    What cannot be written once the run has begun is told, and the run goes on.

    Args:
        log_dir: the folder; ``None`` writes no files.
        say: prints a line.
        total: iterations of the run, as far as is known.
        done: iterations that were done before.
        bar: show a progress bar, where there is a terminal.

    Raises:
        ConfigError: there is a folder, and a package for plots is missing.
    """

    def __init__(
        self, log_dir: str | None, say: Callable[[str], None], *, total: int, done: int = 0, bar: bool = True
    ) -> None:
        self._folder = None if log_dir is None else Path(log_dir)
        self._say = say
        self._total = total
        self._writer: Any = None
        self._bar = _progress_bar(total, done) if bar else None
        self._begin, self._done = now(), done
        if self._folder is not None:
            with naming_extras("log_dir"):
                for package in ("matplotlib", "tensorboard"):
                    importlib.import_module(package)
            self._folder.mkdir(parents=True, exist_ok=True)
            _keep(self._folder / _FILE, done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._folder is not None:
            with self._telling("curves were not written"):
                _plot(self._folder)
        if self._writer is not None:
            with self._telling("the last metrics were not written"):
                self._writer.close()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of iteration ``step``, which begin with 1; 0 is before the first one."""
        line = summary_line(step, self._total, metrics)
        if self._bar is None:
            self._say(line)
        else:
            self._bar.set_postfix_str(self._speed(step), refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.write(line)
        if self._folder is not None:
            with self._telling(f"the metrics of step {step} were not written"):
                self._write(self._folder, step, metrics)

    def _speed(self, step: int) -> str:
        """How long iterations take, and all that are left; the bar's own clock is virtual on simulated ranks."""
        if step == self._done:
            return ""
        each = (now() - self._begin) / (step - self._done)
        return f"{each:.1f} s each, {dt.timedelta(seconds=round(each * (self._total - step)))} left"

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """A full disk ends no run, and keeps no rank from the checkpoint at its end."""
        try:
            yield
        except OSError as error:
            self._say(f"{what} to {self._folder}: {error}")

    def _write(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        entry = {"step": step} | {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with (folder / _FILE).open("a") as file:
            file.write(json.dumps(entry) + "\n")
        if self._writer is None:
            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()


def summary_line(step: int, total: int, metrics: Mapping[str, float]) -> str:
    """What one sees of an iteration: reward, divergence, lengths, losses, tokens per second, seconds of each phase."""
    words = [f"step {step}/{total}"]
    for name, label, form in (
        ("reward", "reward", ".4f"),
        ("reward/accuracy", "accuracy", ".3f"),
        ("kl", "kl", ".4f"),
        ("response_length", "length", ".1f"),
        ("policy_loss", "policy loss", ".4f"),
        ("value_loss", "value loss", ".4f"),
        ("actor/grad_norm", "grad norm", ".3f"),
        ("tokens_per_second", "tokens/s", ".0f"),
        ("eval/reward", "eval reward", ".4f"),
        ("eval/accuracy", "eval accuracy", ".3f"),
    ):
        if name in metrics:
            words.append(f"{label} {metrics[name]:{form}}")
    phases = [
        f"{name[5:]} {value:.2f}s" for name, value in metrics.items() if name.startswith("time/") and value >= 0.005
    ]
    return "  ".join([*words, *([f"({', '.join(phases)})"] if phases else [])])


def _progress_bar(total: int, done: int) -> Any:
    """A bar on the terminal; ``None`` where standard error is none."""
    import sys

    if not sys.stderr.isatty():
        return None
    with naming_extras("progress_bar"):
        from tqdm import tqdm
    form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
    return tqdm(total=total, initial=done, desc="iterations", dynamic_ncols=True, bar_format=form)


def _keep(file: Path, done: int) -> None:
    """Take lines of iterations after ``done`` out of ``file``; all of them if none is done."""
    if not file.exists():
        return
    lines = file.read_text().splitlines(keepends=True)
    kept = [line for line in lines if done and line.endswith("\n") and json.loads(line)["step"] <= done]
    if kept != lines:
        file.write_text("".join(kept))


def _plot(folder: Path) -> None:
    from matplotlib.figure import Figure

    file = folder / _FILE
    entries = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for curve in _CURVES:
        names = [curve if curve == "reward" else f"reward/{curve}", f"eval/{curve}"]
        known = {
            label: [(each["step"], each[name]) for each in entries if each.get(name) is not None]
            for name, label in zip(names, ("training", "evaluation"), strict=True)
        }
        if not any(known.values()):
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for label, points in known.items():
            if points:
                axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 100 else None)
        axes.set_xlabel("iteration")
        axes.set_ylabel(curve)
        axes.legend()
        figure.savefig(folder / f"{curve}.png")
