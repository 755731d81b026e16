"""The examples of the strategies' documentation, on simulated ranks and alone: each as a trainer's author writes it."""

import argparse
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightrft.errors import ConfigError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import engines, workload
from lightrft.strategy import StrategyConfig, get_strategy, register_strategy
from lightrft.strategy.fake_strategy import FakeStrategy, get_fake_strategy
from lightrft.strategy.strategy_base import StrategyBase
from lightrft.utils import add_arguments

# Libraries warn of what they use themselves when they are loaded.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")]

BACKENDS = {
    "fake": {"strategy": "fake", "fsdp": False, "zero_stage": 2},
    "FSDP": {"fsdp": True, "zero_stage": 2},
    "ZeRO-2": {"fsdp": False, "zero_stage": 2},
}


def args_of(backend, **more):
    return SimpleNamespace(
        seed=42, max_norm=1.0, micro_train_batch_size=1, train_batch_size=2, **BACKENDS[backend], **more
    )


def in_world(program, *args, size=2):
    def on_rank():
        import torch.distributed as dist

        try:
            return program(*args)
        finally:
            dist.destroy_process_group()

    return SimWorld(size).run(on_rank)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_basic_use(backend, tmp_path):
    def program():
        strategy = get_strategy(args_of(backend))
        strategy.setup_distributed()
        actor = strategy.prepare(workload.transformer(), is_rlhf=True)
        optimizer = strategy.create_optimizer(actor)
        scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
        norms = []
        for step in range(2):
            for batch in workload.micro_batches(strategy, step, strategy.world_size):
                loss = workload.loss_of(actor(batch), batch)
                strategy.backward(loss, actor, optimizer)
                norms.append(strategy.optimizer_step(optimizer, actor, scheduler))
        strategy.save_ckpt(actor, str(tmp_path / "checkpoints/step_1000"))
        return norms

    found = in_world(program)
    assert found[0] == found[1]
    assert all(norm > 0 for norm in found[0])
    assert (tmp_path / "checkpoints/step_1000/latest").read_text().strip() == "global_step2"


def test_a_typed_configuration_chooses_the_strategy():
    config = StrategyConfig(
        seed=42, max_norm=1.0, micro_train_batch_size=4, train_batch_size=32, bf16=True, fsdp=False, zero_stage=2
    )

    def program():
        strategy = get_strategy(config)
        return type(strategy).__name__, strategy.config.bf16, strategy.accumulated_gradient

    assert in_world(program) == [("DeepspeedStrategy", True, 4)] * 2


@pytest.mark.parametrize("make", [FakeStrategy, get_fake_strategy])
def test_the_fake_strategy_works_alone(make, tmp_path):
    strategy = make()
    strategy.setup_distributed()
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.ones(2, 3)).mean()
    strategy.backward(loss, model, optimizer)
    strategy.save_ckpt(model, str(tmp_path / "test_checkpoints"))
    assert strategy.is_rank_0()
    assert (tmp_path / "test_checkpoints/latest").is_file()


def test_one_flag_switches_the_backend():
    def program(fsdp):
        args = args_of("ZeRO-2")
        args.fsdp = fsdp
        return type(get_strategy(args)).__name__

    assert in_world(program, False) == ["DeepspeedStrategy"] * 2
    assert in_world(program, True) == ["FSDPV2Strategy"] * 2


def test_printing_is_for_rank_0(capsys):
    def program():
        strategy = get_strategy(args_of("fake"))
        step, loss = 3, torch.tensor(0.5)
        strategy.print(f"Training step {step}, loss: {loss.item()}")

    in_world(program)
    assert capsys.readouterr().out == "Training step 3, loss: 0.5\n"


def test_several_engines_sleep_and_wake():
    strategy = FakeStrategy(train_batch_size=1)
    vllm_engine, sglang_engine = engines.Recorder(), engines.Recorder()
    strategy.engines_sleep([vllm_engine, sglang_engine])
    strategy.engines_wake_up([vllm_engine, sglang_engine])
    assert vllm_engine.asked == sglang_engine.asked == ["sleep 1", "wake"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_four_models_are_prepared_at_once(backend):
    def program():
        strategy = get_strategy(args_of(backend))
        models = [workload.transformer(seed) for seed in range(4)]
        actor, critic, _reward_model, _ref_model = strategy.prepare(*models, is_rlhf=True)
        return [strategy.unwrap_model(one) is given for one, given in zip((actor, critic), models[:2], strict=True)]

    assert in_world(program) == [[True, True]] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_optimizer_with_settings_of_its_own(backend):
    def program():
        strategy = get_strategy(args_of(backend))
        optimizer = strategy.create_optimizer(workload.transformer(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1)
        return [(group["lr"], tuple(group["betas"]), group["weight_decay"]) for group in optimizer.param_groups]

    for found in in_world(program):
        assert sorted(found) == [(1e-5, (0.9, 0.95), 0.0), (1e-5, (0.9, 0.95), 0.1)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_averaged_and_gathered(backend):
    def program():
        strategy = get_strategy(args_of(backend))
        local_value = torch.tensor([float(strategy.get_rank())])
        return strategy.all_reduce(local_value, op="mean").item(), strategy.all_gather(local_value).tolist()

    assert in_world(program) == [(0.5, [0.0, 1.0])] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_reward_models_are_sharded(backend):
    def program():
        args = args_of(backend)
        args.train_batch_size = 8
        strategy = get_strategy(args)
        reward_models = [workload.transformer(seed).requires_grad_(False) for seed in range(3)]
        prepared_rms = [strategy.prepare_model(rm, shard_size=8) for rm in reward_models]
        with torch.no_grad():
            return [rm(workload.batch(0, 2)).sum().item() for rm in prepared_rms]

    expected = [workload.transformer(seed)(workload.batch(0, 2)).sum().item() for seed in range(3)]
    for found in in_world(program, size=8):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_optimizer_is_loaded_and_offloaded_around_training(backend):
    """As in a trainer's ``ppo_train``, up to the engine."""

    def program():
        strategy = get_strategy(args_of(backend))
        model = workload.transformer()
        actor, actor_optim, _ = strategy.prepare((model, strategy.create_optimizer(model), None))
        norms = []
        for step in range(2):
            torch.cuda.synchronize()
            strategy.maybe_load_optimizer(actor_optim)
            for batch in workload.micro_batches(strategy, step, strategy.world_size):
                strategy.backward(workload.loss_of(actor(batch), batch), actor, actor_optim)
                norms.append(strategy.optimizer_step(actor_optim, actor, None, name="actor"))
            strategy.maybe_offload_optimizer(actor_optim)
            torch.cuda.synchronize()
            strategy.report_memory(prefix="after training")
        return len(norms)

    assert in_world(program) == [2, 2]


HIGH_THROUGHPUT = """--zero_stage 2 --engine_tp_size 4 --engine_mem_util 0.9 --enable_engine_sleep
    --micro_train_batch_size 1 --train_batch_size 128"""
MEMORY_EFFICIENT = """--fsdp --fsdp_cpu_offload --use_mp_opt --engine_tp_size 2 --engine_mem_util 0.85
    --enable_engine_sleep --micro_train_batch_size 1 --train_batch_size 64"""
VISION = "--fsdp --engine_tp_size 4 --mixed_mm_data --packing_samples --enable_engine_sleep --plot_every 20"
OTHERS = """--bf16 --sp_size 4 --fused_linear_logprob --chunk_size 4096 --log_dir ./logs --plot_every 10
    --disable_engine_sleep --engine_type sglang --adam_offload"""


def test_the_flags_of_the_guide_are_understood():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for line in (HIGH_THROUGHPUT, MEMORY_EFFICIENT, VISION, OTHERS):
        config = StrategyConfig.from_args(parser.parse_args(line.split()))
        config.check_world(8)


class MyCustomStrategy(StrategyBase):
    """A strategy of a user's own: one process, plain torch."""

    def setup_distributed(self, timeout=None):
        pass

    def create_optimizer(self, model, **kwargs):
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def prepare(self, *models_or_pairs, is_rlhf=False):
        return models_or_pairs[0] if len(models_or_pairs) == 1 else list(models_or_pairs)

    def prepare_model(self, model, is_training=False, shard_size=-1, reshard_after_forward=True):
        return model

    def init_model_context(self, meta_init=False):
        return nullcontext()

    def unwrap_model(self, model):
        return model

    def backward(self, loss, model, optimizer, **kwargs):
        loss.backward()

    def optimizer_step(self, optimizer, model, scheduler=None, name="model", **kwargs):
        optimizer.step()

    def full_parameters(self, model):
        yield from model.named_parameters()

    def drop_partial_accumulation(self, model):
        return 0

    def moving_average(self, model, ema, beta=0.992, device="cpu"):
        torch._foreach_lerp_([*ema.parameters()], [*model.parameters()], 1 - beta)

    def save_ckpt(self, model, save_dir, tag=None, **kwargs):
        torch.save(model.state_dict(), f"{save_dir}/{tag}")
        return f"{save_dir}/{tag}"

    def load_ckpt(self, model, load_dir, tag=None, **kwargs):
        model.load_state_dict(torch.load(f"{load_dir}/{tag}"))
        return f"{load_dir}/{tag}", {}

    def save_model(self, model, tokenizer, output_dir, **kwargs):
        torch.save(model.state_dict(), f"{output_dir}/model.pt")

    def offload_model(self, model):
        pass

    def reload_model(self, model):
        pass

    def maybe_offload_optimizer(self, optimizer):
        pass

    def maybe_load_optimizer(self, optimizer):
        pass


def test_a_strategy_of_a_users_own(tmp_path):
    register_strategy("mine", MyCustomStrategy)
    strategy = get_strategy(SimpleNamespace(strategy="mine", train_batch_size=1))
    assert isinstance(strategy, MyCustomStrategy)
    model = strategy.prepare(nn.Linear(2, 1))
    optimizer = strategy.create_optimizer(model)
    before = model.weight.detach().clone()
    strategy.backward(model(torch.ones(1, 2)).sum(), model, optimizer)
    strategy.optimizer_step(optimizer, model)
    assert not torch.equal(model.weight, before)
    assert strategy.all_reduce({"loss": 2.0}) == {"loss": 2.0}
    with strategy.init_model_context():
        average = nn.Linear(2, 1).requires_grad_(False)
    expected = 0.75 * average.weight + 0.25 * model.weight.detach()
    strategy.moving_average(model.requires_grad_(False), average, beta=0.75)
    torch.testing.assert_close(average.weight, expected)
    strategy.save_model(average, None, tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "model.pt")["weight"], expected)
    with pytest.raises(ConfigError, match="mine"):
        get_strategy(SimpleNamespace(strategy="yours"))
