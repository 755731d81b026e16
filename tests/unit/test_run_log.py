"""The log of a run: what a run in a used folder does, and what happens when the disk is full."""

import json
import sys

import pytest

from lightrft.trainer import run_log
from lightrft.trainer.run_log import RunLog

pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")


def written(folder, steps, done=0):
    """What is printed while the metrics of ``steps`` are logged."""
    said = []
    with RunLog(str(folder), said.append, total=9, done=done, bar=False) as log:
        for step in steps:
            log.step(step, {"reward": float(step)})
    return said


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_on_a_terminal_a_bar_tells_what_is_done_and_how_long_the_rest_takes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clock = iter([0.0, 4.0, 8.0])
    monkeypatch.setattr(run_log, "now", lambda: next(clock))
    with RunLog(None, print, total=9, done=2) as log:
        for step in (2, 3, 4):
            log.step(step, {"reward": float(step)})
    out, bars = capsys.readouterr()
    assert out.splitlines() == [f"step {step}/9  reward {step}.0000" for step in (2, 3, 4)]
    assert "2/9\r" in bars.replace(" ", "")
    assert "3/9, 4.0 s each, 0:00:24 left" in bars
    assert "4/9, 4.0 s each, 0:00:20 left" in bars


def test_a_run_that_begins_anew_begins_its_file_anew(tmp_path):
    written(tmp_path, [0, 1, 2])
    written(tmp_path, [0, 1])
    assert steps_in(tmp_path) == [0, 1]


def test_a_run_that_is_resumed_goes_on_from_its_checkpoint(tmp_path):
    written(tmp_path, [0, 1, 2, 3])
    written(tmp_path, [3], done=2)
    assert steps_in(tmp_path) == [0, 1, 2, 3]


def test_curves_that_cannot_be_written_are_told_and_the_run_goes_on(tmp_path):
    (tmp_path / "reward.png").mkdir()
    said = written(tmp_path, [1])
    assert said[-1].startswith(f"curves were not written to {tmp_path}: ")
    assert steps_in(tmp_path) == [1]
