"""What a strategy does with engines that are not its own: those of a library, and dead ones."""

import warnings

import pytest
import torch

from lightrft.errors import ConfigError, EngineStateError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy.engines import Recorder
from lightrft.strategy import get_strategy
from lightrft.strategy.requests import Request, request_of


class Sglang:
    """As the engine of the library: it dies of resuming what was never released."""

    def __init__(self):
        self.asked = []

    def release_memory_occupation(self):
        self.asked.append("release")

    def resume_memory_occupation(self):
        assert self.asked.count("resume") < self.asked.count("release"), "the scheduler dies"
        self.asked.append("resume")


class Vllm:
    def __init__(self):
        self.asked = []

    def sleep(self, level):
        self.asked.append(f"sleep {level}")

    def wake_up(self):
        self.asked.append("wake")


@pytest.mark.parametrize(
    ("kind", "asked"), [(Sglang, ["release", "resume", "release"]), (Vllm, ["sleep 1", "wake", "sleep 1"])]
)
def test_k27_an_engine_of_a_library_sleeps_and_wakes_once(kind, asked):
    strategy, engine = get_strategy({"strategy": "fake"}), kind()
    strategy.engines_wake_up([engine])
    for turn in (strategy.engines_sleep, strategy.engines_wake_up, strategy.engines_sleep):
        turn([engine])
        turn([engine])
    assert engine.asked == asked


@pytest.mark.parametrize(
    "call",
    [
        lambda strategy: strategy.engine_generate_local({}, prompt_token_ids=[[1]]),
        lambda strategy: strategy.gather_and_generate({}, all_prompt_token_ids=[[1]]),
    ],
)
def test_f17_a_dead_engine_is_refused_and_can_be_replaced(call):
    strategy = get_strategy({"strategy": "fake"})
    strategy.inference_engine = dead = Recorder()
    dead.shutdown()
    strategy.maybe_sleep_inference_engine()
    strategy.wakeup_inference_engine()
    assert dead.asked == []
    with pytest.raises(EngineStateError, match=r"which is dead: call strategy.setup_inference_engine\(\)"):
        call(strategy)


def test_prompts_as_vllm_takes_them():
    strategy = get_strategy({"strategy": "fake"})
    strategy.inference_engine = engine = Recorder()
    strategy.maybe_sleep_inference_engine()
    found = strategy.engine_generate_local(
        {},
        multi_modal_inputs=[
            {"prompt_token_ids": [1, 2], "multi_modal_data": {"image": "i"}},
            {"prompt": "a", "multi_modal_data": {"video": ["v", "w"]}},
            Request(prompt="b"),
        ],
    )
    assert [request for request, _ in found] == [
        Request(prompt_token_ids=(1, 2), images=("i",)),
        Request(prompt="a", videos=("v", "w")),
        Request(prompt="b"),
    ]
    assert engine.asked == ["sleep 1", "wake", "generate"]
    with pytest.raises(ConfigError, match="expected a mapping with some of multi_modal_data, prompt"):
        request_of({"tokens": [1]})
    with pytest.raises(ConfigError, match="got 'a'"):
        request_of("a")


def test_k28_a_late_setting_of_the_process_group_is_no_silent_one():
    def program():
        strategy = get_strategy({"fsdp": True, "train_batch_size": 1})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            strategy.setup_distributed()
        with pytest.warns(UserWarning, match="change nothing now; give num_gpu_per_node in args"):
            strategy.setup_distributed(num_gpu_per_node=4)
        torch.distributed.destroy_process_group()

    SimWorld(1).run(program)


def test_k19_ranks_of_a_machine_come_from_args_where_the_variables_do_not_say(monkeypatch):
    strategy = get_strategy({"strategy": "fake", "num_gpu_per_node": 3})
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NODELIST": "n[1-2]", "SLURM_JOB_ID": "7"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert strategy._place().local_rank == 2
