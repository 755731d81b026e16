"""The scripts that train: the documented commands, the demonstration, and a run that is killed and goes on."""

import importlib
import json
import os
import re
import signal
import sys

import pytest
from launches import kill_with_children, output_of, start, told_by_processes, told_by_simulated_ranks

from lightrft.errors import RankFailedError

pytestmark = pytest.mark.processes

DOCUMENTED = {
    "High-Throughput": (
        "examples/train.py",
        (
            "--zero_stage 2 --engine_tp_size 4 --engine_mem_util 0.9 --enable_engine_sleep --micro_train_batch_size 1 "
            "--train_batch_size 128"
        ),
    ),
    "Memory-Efficient": (
        "examples/train.py",
        (
            "--fsdp --fsdp_cpu_offload --use_mp_opt --engine_tp_size 2 --engine_mem_util 0.85 --enable_engine_sleep "
            "--micro_train_batch_size 1 --train_batch_size 64"
        ),
    ),
    "Vision-Language": (
        "examples/train_vl.py",
        "--fsdp --engine_tp_size 4 --mixed_mm_data --packing_samples --enable_engine_sleep --plot_every 20",
    ),
}


LESS = ("--max_steps", "1")


def steps(told):
    """The iterations that a run tells of, and how many it has."""
    return [(int(step), int(total)) for step, total in re.findall(r"^step (\d+)/(\d+)  ", told, re.MULTILINE)]


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_documented_command_runs_as_it_is_written(command, tmp_path):
    script, flags = DOCUMENTED[command]
    found = steps(told_by_simulated_ranks(8, script, *flags.split(), *LESS, "--log_dir", str(tmp_path), seconds=250))
    assert found == [(1, 1)]
    assert (tmp_path / "reward.png").exists()


@pytest.mark.parametrize("command", DOCUMENTED)
def test_a_documented_command_runs_in_real_processes(command, tmp_path):
    script, flags = DOCUMENTED[command]
    rest = (*LESS, "--fake_engine", "--log_dir", str(tmp_path))
    assert steps(told_by_processes(4, script, *flags.split(), *rest, seconds=250)) == [(1, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the demonstration has been run, from a model that was shown some answers."""
    path = tmp_path_factory.mktemp("demo")
    told = output_of(demo(path, "--shown", "60", *FOUR), seconds=250)
    assert re.search(r"^held-out accuracy: 0\.\d+ before, 0\.\d+ after 4 iterations", told, re.MULTILINE)
    return path


FOUR = ("--max_steps", "4", "--save_steps", "1")


def demo(folder, *flags):
    return [sys.executable, "examples/demo.py", "--folder", str(folder), *flags]


def noted(folder):
    """What a run notes of each iteration, but for times."""
    entries = map(json.loads, (folder / "logs" / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in entry.items() if not name.startswith(("time/", "tokens_per"))}
        for entry in entries
    ]


def begun(folder, name):
    """Another folder with the model that was shown the answers of ``folder``."""
    kept = folder / name
    kept.mkdir()
    (kept / "start").symlink_to(folder / "start")
    return kept


def trained(folder, processes, *flags):
    """What the command prints that the demonstration trains with, run where the libraries are loaded."""
    sys.path.insert(0, "examples")
    try:
        command = importlib.import_module("demo").command(folder, processes, flags)
    finally:
        sys.path.remove("examples")
    begin = next(place for place, word in enumerate(command) if word.endswith("train.py"))
    script, *words = command[begin:]
    told = told_by_processes if processes else told_by_simulated_ranks
    return told(processes or 8, script, *words, seconds=250)


@pytest.fixture(scope="module")
def in_processes(folder):
    kept = begun(folder, "in_processes")
    trained(kept, 2, *FOUR)
    return noted(kept)


def test_the_demonstration_has_nearly_the_same_curve_in_real_processes(folder, in_processes):
    expected = noted(folder)
    assert [entry["step"] for entry in expected] == [0, 1, 2, 3, 4]
    assert in_processes[0]["eval/accuracy"] == expected[0]["eval/accuracy"]
    assert in_processes[1]["reward"] == pytest.approx(expected[1]["reward"], abs=0.1)


def killed(process):
    kill_with_children(process)
    return ""


def interrupted(process):
    """Ctrl-C goes to all processes that the terminal has started."""
    os.killpg(process.pid, signal.SIGINT)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return told


@pytest.mark.parametrize(
    ("end", "launcher"),
    [(killed, []), (killed, ["--torchrun", "2"]), (interrupted, [])],  # for torchrun and Ctrl-C see test_trainer.py
    ids=["killed-simulated", "killed-torchrun", "interrupted-simulated"],
)
def test_f18_a_demonstration_that_is_stopped_goes_on_to_the_same_end(folder, in_processes, end, launcher):
    kept = begun(folder, f"{end.__name__}-{len(launcher)}")
    flags = ["--max_steps", "4", "--save_steps", "1" if end is killed else "100"]
    process = start(demo(kept, "--shown", "0", *flags, *launcher))
    for line in process.stdout:
        if line.startswith("step 2/"):
            rest = end(process)
            break
    assert ("stopped after iteration" in rest) is (end is interrupted)
    if end is interrupted:
        told = output_of(demo(kept, *flags, "--resume"), seconds=250)
    else:
        told = trained(kept, 2 if launcher else None, *flags, "--resume")
    assert re.search(r"^resumed after iteration [123]$", told, re.MULTILINE)
    assert noted(kept) == (in_processes if launcher else noted(folder))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bf16", "--fp16"], "bf16"),
        (["--advantage_estimator", "grpo"], "n_samples_per_prompt is 1: set it to 2 or more"),
        (["--config", "no_such.yaml"], "no_such.yaml"),
        (["--engine_type", "sglang"], "the package sglang is not installed: install it, or pass --fake_engine"),
    ],
)
def test_flags_that_cannot_work_are_told_at_once(flags, message, capfd):
    with pytest.raises(RankFailedError) as caught:
        told_by_processes(1, "examples/train.py", *flags)
    assert isinstance(caught.value.__cause__, SystemExit)
    assert caught.value.__cause__.code == 2
    assert message in capfd.readouterr().err


def test_a_file_has_flags_and_the_command_line_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "fsdp: true\nmax_steps: 2\nrollout_batch_size: 16\ntrain_batch_size: 16\nactor_learning_rate: 1e-5\n"
    )
    told = told_by_processes(1, "examples/train.py", "--config", str(file), "--max_steps", "1", "--fake_engine")
    assert steps(told) == [(1, 1)]
