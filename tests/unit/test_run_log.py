"""The log of a run: what a run in a used folder does, and what happens when the disk is full."""

import json

import pytest

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
