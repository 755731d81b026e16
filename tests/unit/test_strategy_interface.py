"""What all strategies offer is the same, to the last argument; and what it takes to import them."""

import inspect
import subprocess
import sys

import pytest
import torch.distributed as dist

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.sim.strategy import FakeStrategy
from lightrft.strategy import StrategyBase
from lightrft.strategy.deepspeed.deepspeed import DeepspeedStrategy
from lightrft.strategy.fsdp.fsdpv2 import FSDPV2Strategy

STRATEGIES = [DeepspeedStrategy, FSDPV2Strategy, FakeStrategy]

SURFACE = [
    "all_gather",
    "all_reduce",
    "backward",
    "create_optimizer",
    "drop_partial_accumulation",
    "engine_generate_local",
    "engines_sleep",
    "engines_wake_up",
    "full_parameters",
    "gather_and_generate",
    "get_rank",
    "inference_engine_status",
    "init_model_context",
    "is_rank_0",
    "load_ckpt",
    "maybe_load_optimizer",
    "maybe_offload_optimizer",
    "maybe_sleep_inference_engine",
    "moving_average",
    "offload_model",
    "optimizer_step",
    "prepare",
    "prepare_model",
    "prepare_models_and_optimizers",
    "prepare_reward_model",
    "print",
    "reload_model",
    "report_memory",
    "save_ckpt",
    "save_model",
    "set_seed",
    "setup_dataloader",
    "setup_distributed",
    "setup_inference_engine",
    "sync_and_clear_cache",
    "unwrap_model",
    "update_engine_weights",
    "wakeup_inference_engine",
]


def public(cls):
    return {name for name in dir(cls) if not name.startswith("_")}


def test_the_surface_of_the_base_is_pinned():
    assert sorted(public(StrategyBase)) == SURFACE


def arguments(function):
    """Names, kinds and defaults."""
    return [(one.name, one.kind, one.default) for one in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_k02_every_strategy_has_the_same_methods(strategy):
    extra = public(strategy) - set(SURFACE)
    assert extra <= {"backend"}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", [name for name in SURFACE if name != "inference_engine_status"])
def test_k02_every_method_has_the_same_signature(strategy, name):
    assert arguments(getattr(strategy, name)) == arguments(getattr(StrategyBase, name))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_k02_every_constructor_begins_alike(strategy):
    base = arguments(StrategyBase)
    assert arguments(strategy)[: len(base)] == base


def test_the_base_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        StrategyBase()


def test_a_fake_alone_is_one_rank_without_a_process_group():
    strategy = FakeStrategy()
    strategy.setup_distributed()
    assert strategy.is_rank_0()
    assert strategy.world_size == 1
    assert strategy.accumulated_gradient == 128
    assert not dist.is_initialized()


def test_attributes_of_the_documents_are_there():
    strategy = FakeStrategy(train_batch_size=4)
    for name in (
        "args", "config", "world_size", "accumulated_gradient", "engine_mp_group", "engine_dp_group",
        "sp_data_processor", "inference_engine", "inference_engine_status", "inference_engine_type", "device",
    ):  # fmt: skip
        assert hasattr(strategy, name), name


def test_what_the_fake_mirrors_follows_the_flag():
    assert FakeStrategy(args={"fsdp": True}).mirrors == "fsdp"
    assert FakeStrategy(args={}).mirrors == "deepspeed"
    assert FakeStrategy(args={}, mirrors="fsdp").mirrors == "fsdp"
    with pytest.raises(ConfigError, match="deepspeed, fsdp"):
        FakeStrategy(mirrors="megatron")


def test_only_rank_0_prints(capsys):
    def program():
        from lightrft.strategy import get_strategy

        get_strategy({"strategy": "fake", "train_batch_size": 4}).print("hello", 3)
        dist.destroy_process_group()

    SimWorld(4).run(program)
    assert capsys.readouterr().out == "hello 3\n"


BLOCKED = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "vllm", "sglang", "transformers", "accelerate", "peft"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import lightrft
import lightrft.strategy.deepspeed.deepspeed
import lightrft.strategy.fsdp.fsdpv2
from lightrft.errors import ConfigError
from lightrft.strategy import FakeStrategy, StrategyBase, StrategyConfig, get_strategy, is_engine, register_strategy
from lightrft.strategy.fake_strategy import get_fake_strategy
from lightrft.utils import add_arguments
import torch

strategy = FakeStrategy(train_batch_size=1)
model = torch.nn.Linear(2, 2)
optimizer = strategy.create_optimizer(model)
model, optimizer, _ = strategy.prepare((model, optimizer, None))
strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
assert strategy.optimizer_step(optimizer, model, None) > 0
try:
    get_strategy({"fsdp": False, "train_batch_size": 1})
except ConfigError as error:
    assert "lightrft[deepspeed]" in str(error), error
else:
    raise SystemExit("a missing package went unnoticed")
print("done")
"""


def test_k01_strategies_need_neither_cuda_nor_the_libraries_below():
    found = subprocess.run([sys.executable, "-c", BLOCKED], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "done\n"
