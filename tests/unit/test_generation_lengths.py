"""Plots of generation lengths."""

import contextlib
import sys

import pytest
import torch.distributed as dist

from lightrft.errors import ConfigError, EngineStateError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy.engines import Recorder
from lightrft.strategy import get_strategy
from lightrft.strategy.requests import Completion

pytest.importorskip("matplotlib")
pytest.importorskip("tensorboard")


class Counting(Recorder):
    """Completes a prompt by as many tokens as it has."""

    def generate(self, requests, sampling_params):
        return [
            Completion(prompt_token_ids=one.prompt_token_ids, output_token_ids=one.prompt_token_ids) for one in requests
        ]


def rollouts(size, steps, **settings):
    def program():
        strategy = get_strategy({"strategy": "fake", "train_batch_size": size, **settings})
        strategy.inference_engine = Counting()
        for step in range(steps):
            prompts = [[1] * (step + strategy.get_rank() + 1)] * strategy.get_rank()  # none on rank 0
            strategy.gather_and_generate({}, all_prompt_token_ids=prompts)
        dist.destroy_process_group()

    SimWorld(size).run(program)


def test_k24_lengths_of_all_ranks_are_plotted_every_few_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rollouts(3, 5, plot_every=2, log_dir=str(tmp_path))
    files = sorted(file.name for file in (tmp_path / "generation_lengths").iterdir())
    assert files == ["step_00000002.png", "step_00000004.png"]
    assert (tmp_path / "generation_lengths" / files[0]).read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(tmp_path / "tensorboard"), {"histograms": 0})
    events.Reload()
    found = {each.step: each.value for each in events.Scalars("generation_length/mean")}
    # Rank 1 has one prompt of step + 2 tokens, rank 2 two of step + 3; steps 0 and 1, then 2 and 3.
    assert found == pytest.approx({2: (2 + 3 + 2 * (3 + 4)) / 6, 4: (4 + 5 + 2 * (5 + 6)) / 6})
    assert [each.value for each in events.Scalars("generation_length/max")] == [4, 6]
    histograms = {each.step: each.histogram_value for each in events.Histograms("generation_length")}
    assert {step: (one.num, one.min, one.max) for step, one in histograms.items()} == {2: (6, 2, 4), 4: (6, 4, 6)}


def test_k24_an_engine_that_fails_does_not_keep_the_others_from_plotting(tmp_path):
    class FailsOnce(Counting):
        def generate(self, requests, sampling_params):
            if sampling_params["fails"]:
                raise ValueError("no memory left")
            return super().generate(requests, sampling_params)

    def program():
        strategy = get_strategy(
            {"strategy": "fake", "train_batch_size": 4, "engine_tp_size": 2, "plot_every": 2, "log_dir": str(tmp_path)}
        )
        strategy.inference_engine = FailsOnce()
        first_engine = strategy.get_rank() < 2
        found = []
        for step in range(4):
            with contextlib.suppress(EngineStateError):
                fails = first_engine and step == 1
                found.append(len(strategy.gather_and_generate({"fails": fails}, all_prompt_token_ids=[[1]])))
        dist.destroy_process_group()
        return found

    assert SimWorld(4).run(program) == [[1, 1, 1]] * 2 + [[1, 1, 1, 1]] * 2
    files = sorted(file.name for file in (tmp_path / "generation_lengths").iterdir())
    assert files == ["step_00000002.png", "step_00000004.png"]


def test_k24_without_plot_every_nothing_is_written(tmp_path):
    rollouts(2, 3, log_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    strategy = get_strategy({"strategy": "fake", "plot_every": 1, "log_dir": str(tmp_path)})
    strategy.inference_engine = Counting()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"plot_every needs the package matplotlib.*lightrft\[plots\]"):
        strategy.gather_and_generate({}, all_prompt_token_ids=[[1]])


def test_a_plot_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "generation_lengths").write_text("a file in the place of the folder")
    told = []

    def program():
        strategy = get_strategy({"strategy": "fake", "train_batch_size": 2, "plot_every": 1, "log_dir": str(tmp_path)})
        strategy.inference_engine = Counting()
        with pytest.raises(ConfigError, match="generation lengths were not plotted: rank 0: FileExistsError"):
            strategy.gather_and_generate({}, all_prompt_token_ids=[[1]])
        told.append(strategy.get_rank())
        dist.destroy_process_group()

    SimWorld(2, stall_limit=15).run(program)
    assert sorted(told) == [0, 1]
