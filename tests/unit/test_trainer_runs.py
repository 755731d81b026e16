"""What is around the iterations of a run: evaluation, logs, stopping."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from trainer_parts import EvenTokens, parts, prompts
from trainer_worlds import in_world

from lightrft.errors import ConfigError, RankFailedError
from lightrft.trainer import SPMDPPOTrainer
from lightrft.trainer.metrics import Stopwatch
from lightrft.trainer.run_log import summary_line
from lightrft.trainer.stopping import StopRequest

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]


@pytest.mark.parametrize(("count", "size"), [(11, 2), (1, 2), (8, 4)])
def test_every_prompt_is_evaluated_once(count, size):
    def program():
        seen = []

        def reward(asked, responses, labels):
            seen.extend(labels)
            return {"reward": [float(label) for label in labels], "accuracy": [1.0] * len(labels)}

        trainer = SPMDPPOTrainer(reward_model=reward, **parts())
        trainer._sync_engine()
        found = trainer.evaluate(prompts(count))
        return found, seen

    results = in_world(program, size)
    assert sorted(label for _, seen in results for label in seen) == list(range(count))
    assert results[0][0]["eval/reward"] == pytest.approx(sum(range(count)) / count)
    assert results[0][0]["eval/accuracy"] == 1
    assert [found for found, _ in results] == [results[0][0]] * size


@pytest.mark.parametrize(("every", "evaluated"), [(2, [0, 2, 4]), (3, [0, 3, 4]), (0, [])])
def test_evaluations_are_due_every_few_iterations_and_at_the_end(every, evaluated, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")

    def program():
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(log_dir=str(tmp_path)), eval_steps=every)
        trainer.fit(prompts(32), eval_prompts=prompts(3))

    in_world(program)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/reward" in line] == evaluated


def test_what_people_and_programs_see_of_a_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def program():
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(log_dir=str(tmp_path)))
        return trainer.fit(prompts(24))

    last = in_world(program)[0]
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in printed] == ["1/3", "2/3", "3/3"]
    for word in ("reward 0.", "accuracy ", "kl ", "length ", "policy loss", "value loss", "grad norm"):
        assert all(word in line for line in printed)
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert entries[-1]["reward"] == last["reward"]
    assert {"time/generate", "time/reward", "time/score", "time/train", "time/sync"} <= set(entries[-1])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [each.value for each in events.Scalars("reward")] == pytest.approx([entry["reward"] for entry in entries])
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_the_line_of_an_iteration_by_hand():
    metrics = {"reward": 0.5, "kl": 0.25, "tokens_per_second": 1234.4, "time/generate": 1.5, "time/sync": 0.001}
    expected = "step 3/8  reward 0.5000  kl 0.2500  tokens/s 1234  (generate 1.50s)"
    assert summary_line(3, 8, metrics) == expected


def test_a_log_that_cannot_be_opened_is_an_error_on_all_ranks(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "logs").write_text("a file")

    def program():
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(log_dir=str(tmp_path / "logs")))
        with pytest.raises(ConfigError, match="the log was not opened: rank 0: FileExistsError"):
            trainer.fit(prompts(8))

    in_world(program)


def test_a_full_disk_ends_no_run(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts(log_dir=str(tmp_path)), max_steps=2)

    def full(self, folder, step, metrics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lightrft.trainer.run_log.RunLog._write", full)
    trainer.fit(prompts(16))
    assert "the metrics of step 2 were not written" in capsys.readouterr().out


def test_one_rank_may_ask_to_stop():
    def program():
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **parts())
        once = trainer.ppo_train

        def ppo_train(global_steps=0):
            if global_steps == 1 and trainer.strategy.get_rank() == 1:
                trainer.request_stop()
            return once(global_steps)

        trainer.ppo_train = ppo_train
        trainer.fit(prompts(32))
        return trainer.state.step

    assert in_world(program) == [2, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_ends(number, tmp_path):
    before = signal.getsignal(number)

    def reward(asked, responses, labels):
        signal.raise_signal(number)
        return [0.0] * len(asked)

    trainer = SPMDPPOTrainer(reward_model=reward, **parts(), ckpt_path=str(tmp_path))
    trainer.fit(prompts(32))
    assert trainer.state.step == 1
    assert (tmp_path / "actor" / "step_00000001").is_dir()
    assert signal.getsignal(number) is before


def test_phases_are_measured_in_real_time_on_simulated_ranks():
    def program():
        watch = Stopwatch()
        with watch.phase("work"):
            time.sleep(3600)  # virtual, and over at once
            begin = time.clock_gettime(time.CLOCK_MONOTONIC)
            while time.clock_gettime(time.CLOCK_MONOTONIC) < begin + 0.01:
                pass
        return watch.taken()

    (found,) = in_world(program, 1)
    assert 0.01 <= found["time/work"] < 60


def test_ctrl_c_saves_and_ends_on_simulated_ranks(tmp_path):
    def program():
        made = parts()
        presses = iter([signal.SIGINT] * dist.get_rank())

        def reward(asked, responses, labels):
            for number in presses:
                signal.raise_signal(number)  # in the process, which all ranks share
            return [0.0] * len(asked)

        trainer = SPMDPPOTrainer(reward_model=reward, **made, ckpt_path=str(tmp_path))
        trainer.fit(prompts(1600))
        return trainer.state.step

    first, second = in_world(program, stall_after=0.2)
    assert first == second < 200
    assert (tmp_path / "actor" / f"step_{first:08}").is_dir()


def test_in_another_thread_a_run_takes_no_signals():
    before = signal.getsignal(signal.SIGINT)

    def inside():
        with StopRequest() as stop:
            return signal.getsignal(signal.SIGINT) is before, stop.is_made

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(inside).result() == (True, False)


def test_a_later_ctrl_c_interrupts_at_once():
    with StopRequest(patience=0.0) as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.is_made
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_ctrl_c_that_a_launcher_passes_on_is_the_same_one():
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            signal.raise_signal(number)
        assert stop.is_made
    with stop:
        assert not stop.is_made


def test_an_error_of_one_rank_ends_the_run_of_all():
    def program():
        made = parts()
        trainer = SPMDPPOTrainer(reward_model=EvenTokens(), **made)
        if made["strategy"].get_rank() == 0:
            made["strategy"].inference_engine.failure = RuntimeError("the engine is gone")
        trainer.fit(prompts(8))

    with pytest.raises(RankFailedError, match="the engine is gone"):
        in_world(program)
