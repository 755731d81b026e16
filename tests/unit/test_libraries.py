"""DeepSpeed, accelerate, transformers and torch's own trainers on simulated ranks, beside one process that sees all."""

from __future__ import annotations

import sys

import pytest
import torch
from programs import hugging_face, tiny, torch_native, zero, zero_adam

from lightrft.errors import RankFailedError
from lightrft.sim import SimWorld

pytestmark = pytest.mark.filterwarnings("ignore")


def assert_equal(results, expected, *, atol=1e-6):
    for result in results:
        for name, weight in result["weights"].items():
            torch.testing.assert_close(weight, expected["weights"][name], atol=atol, rtol=0, msg=name)
        torch.testing.assert_close(result["norms"], expected["norms"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "program",
    [torch_native.ddp, torch_native.fsdp2, torch_native.hsdp, zero.zero1, zero.zero2, zero.zero3, zero.zero3_offloads],
    ids=lambda program: program.__name__,
)
def test_data_parallel_training_equals_one_process(program, size):
    assert_equal(SimWorld(size).run(program), torch_native.plain(ranks=size))


@pytest.mark.slow
def test_fsdp2_on_64_ranks_equals_one_process():
    assert_equal(SimWorld(64).run(torch_native.fsdp2), torch_native.plain(ranks=64))


@pytest.mark.slow
def test_zero3_on_16_ranks_equals_one_process():
    assert_equal(SimWorld(16).run(zero.zero3), torch_native.plain(ranks=16))


@pytest.mark.parametrize("program", [torch_native.fsdp2, zero.zero3_built_in_context, hugging_face.accelerate_zero3])
def test_the_order_in_which_ranks_run_does_not_matter(program):
    in_turn = SimWorld(4).run(program)
    drawn = SimWorld(4, schedule="random", seed=3).run(program)
    for ours, theirs in zip(in_turn, drawn, strict=True):
        assert ours["losses"] == theirs["losses"]
        for name, weight in ours["weights"].items():
            assert torch.equal(weight, theirs["weights"][name]), name


@pytest.mark.parametrize("stage", [2, 3])
def test_a_checkpoint_is_resumed_exactly(stage, tmp_path):
    saved = SimWorld(2).run(getattr(zero, f"zero{stage}_saves"), str(tmp_path))
    loaded = SimWorld(2).run(getattr(zero, f"zero{stage}_loads"), str(tmp_path))
    for before, after in zip(saved, loaded, strict=True):
        assert before["losses"] == after["losses"]
        for name, weight in before["weights"].items():
            assert torch.equal(weight, after["weights"][name]), name


def test_ulysses_computes_the_loss_of_whole_sequences():
    split = SimWorld(2).run(hugging_face.ulysses)
    model = hugging_face.qwen2(attn_implementation="sdpa")
    example = hugging_face.Tokens()[0]
    logits = model(input_ids=example["input_ids"][None]).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, example["labels"][1:])
    mean = (split[0]["losses"][0] + split[1]["losses"][0]) / 2
    torch.testing.assert_close(mean, expected.item(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("program", ["trainer_ddp", "trainer_zero3", "trainer_fsdp2"])
def test_the_trainer_of_transformers_runs(program, tmp_path):
    results = SimWorld(2).run(getattr(hugging_face, program), str(tmp_path))
    assert all(len(result["norms"]) == 3 for result in results)
    expected = SimWorld(2).run(hugging_face.trainer_zero2, str(tmp_path))
    torch.testing.assert_close(results[0]["losses"], expected[0]["losses"], atol=1e-5, rtol=0)


# -- DeepSpeed's edges ------------------------------------------------------------------------------------------------


def test_deepspeeds_own_optimizers_take_the_steps_of_torchs():
    [expected, _] = SimWorld(2).run(zero_adam.zero2_torch_adam)
    for program in ("zero2_fused_adam", "zero3_fused_adam", "zero2_cpu_adam", "zero3_cpu_adam"):
        [result, _] = SimWorld(2).run(getattr(zero_adam, program))
        assert result["optimizer"] == ("DeepSpeedCPUAdam" if "cpu" in program else "FusedAdam"), program
        torch.testing.assert_close(result["losses"], expected["losses"], atol=1e-5, rtol=0, msg=program)
        for name, weight in result["weights"].items():
            if not name.endswith("inputs.bias"):
                torch.testing.assert_close(weight, expected["weights"][name], atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize("cuda", [False, True])
def test_nothing_is_compiled_for_a_program_that_takes_no_care(monkeypatch, cuda):
    """DeepSpeed's defaults: its own optimizer, and whatever it does when it sets up communication."""
    from torch.utils import cpp_extension

    def body():
        zero.deepspeed.init_distributed(verbose=False)
        settings = zero.config(2, optimizer={"type": "AdamW", "params": {"lr": 0.01}})
        model = tiny.transformer()
        engine, *_ = zero.deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
        losses, _ = zero.train(engine)
        zero.end(engine)
        return [loss.item() for loss in losses]

    compiled = []
    monkeypatch.setattr(cpp_extension, "load", lambda *args, **kwargs: compiled.append(kwargs.get("name", args)))
    losses = SimWorld(2, cuda=cuda).run(body)
    assert losses[0][0] != losses[0][1]
    assert compiled == []


def test_an_operation_that_would_be_compiled_is_refused():
    def body():
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

        DeepSpeedCPUAdagrad(tiny.transformer().parameters())

    with pytest.raises(RankFailedError, match=r"'cpu_adagrad' would be compiled.*torch\.optim"):
        SimWorld(1).run(body)


def traces():
    from deepspeed.ops.op_builder.builder import OpBuilder

    builder = vars(sys.modules["deepspeed.ops"]).get("__compatible_ops__", "not asked")
    patched = [torch.zeros, torch.empty, torch.Tensor.__new__, torch.nn.functional.linear, torch.nn.Module.apply]
    inits = {cls: vars(cls).get("__init__") for cls in (torch.nn.Module, torch.nn.Linear, tiny.Transformer)}
    subclass = vars(torch.nn.Module).get("__init_subclass__")
    return [OpBuilder.jit_load, dict(OpBuilder._loaded_ops), builder, patched, inits, subclass]


def test_deepspeed_leaves_nothing_behind():
    before = traces()
    SimWorld(2).run(zero.zero3_built_in_context)
    assert traces() == before
    plain = tiny.transformer()
    assert not any(hasattr(parameter, "ds_id") for parameter in plain.parameters())


def test_a_failure_inside_the_context_leaves_nothing_behind():
    def body():
        zero.start()
        with zero.deepspeed.zero.Init(config_dict_or_path=zero.config(3), dtype=torch.float32):
            tiny.Block()
            raise ValueError("in the middle")

    before = traces()
    with pytest.raises(RankFailedError, match="in the middle"):
        SimWorld(2).run(body)
    assert traces() == before


def test_a_class_that_one_rank_imports_inside_the_context_is_partitioned_on_all(tmp_path, monkeypatch):
    import torch.distributed as dist

    (tmp_path / "imported_inside.py").write_text(
        "import torch\n\n\nclass Late(torch.nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.weight = torch.nn.Parameter(torch.ones(4, 4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def body():
        zero.start()
        with zero.deepspeed.zero.Init(config_dict_or_path=zero.config(3), dtype=torch.float32):
            dist.barrier()
            if dist.get_rank() == 1:
                import imported_inside  # noqa: F401 - the first to do so
            dist.barrier()
            from imported_inside import Late

            model = torch.nn.Sequential(Late(), Late())
        with zero.deepspeed.zero.Init(config_dict_or_path=zero.config(3), dtype=torch.float32):
            dist.barrier()
            again = Late()
        found = [hasattr(parameter, "ds_id") for module in (model, again) for parameter in module.parameters()]
        plain = hasattr(Late().weight, "ds_id")
        zero.end()
        return found, plain

    assert SimWorld(3).run(body) == [([True] * 3, False)] * 3
    del sys.modules["imported_inside"]


def test_a_rank_outside_the_context_builds_whole_modules():
    """While rank 0 is inside ``zero.Init`` of a group of its own, rank 1 builds an ordinary module."""
    import torch.distributed as dist

    def body():
        zero.start()
        alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
        if dist.get_rank() == 0:
            with zero.deepspeed.zero.Init(
                data_parallel_group=alone, config_dict_or_path=zero.config(3), dtype=torch.float32
            ):
                dist.barrier()
                model = tiny.Block()
                dist.barrier()
        else:
            dist.barrier()
            model = tiny.Block()
            dist.barrier()
        found = [hasattr(parameter, "ds_id") for parameter in model.parameters()]
        zero.end()
        return any(found), all(found)

    assert SimWorld(2).run(body) == [(True, True), (False, False)]
