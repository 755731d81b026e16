"""What FSDPV2Strategy writes and reads: checkpoints, saved models, and models that only rank 0 builds."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import torch.distributed as dist
from programs import fsdp
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from lightrft.errors import CheckpointError, ConfigError
from lightrft.sim import SimWorld
from lightrft.sim.contracts.strategy import workload
from lightrft.sim.contracts.strategy.workload import same
from lightrft.strategy.fsdp import fsdp_checkpoint
from lightrft.strategy.utils import saving
from lightrft.strategy.utils.agreement import Ranks

FP16_MASTERS = {"fp16": True, "use_mp_opt": True, "fsdp_cpu_offload": True}


def on(ranks, program, *args):
    return SimWorld(ranks, stall_limit=15).run(fsdp.ending, program, *args)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "others"), [(1, 4), (2, 1), (4, 2)])
def test_f19_a_checkpoint_loads_at_another_number_of_ranks(ranks, others, tmp_path):
    expected = on(ranks, fsdp.saves, str(tmp_path), {})[0]
    for found in on(others, fsdp.loads, str(tmp_path), {}):
        same(found["saved"], expected["saved"], what="loaded", within=0.0)
        same(found["weights"], expected["weights"], what="trained on", within=1e-6)
        torch.testing.assert_close(found["after"], expected["after"], atol=0, rtol=2e-6)
        assert found["rate"] == 1e-3


@pytest.mark.parametrize("settings", [{}, {"bf16": True}, {"bf16": True, "use_mp_opt": True}, FP16_MASTERS])
def test_f18_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(settings, tmp_path):
    expected = on(2, fsdp.saves, str(tmp_path), settings)[0]
    found = on(2, fsdp.loads, str(tmp_path), settings)[0]
    assert found["after"] == expected["after"]
    same(found["weights"], expected["weights"], what="resumed", within=0.0)


def test_masters_are_what_is_written_so_that_any_precision_reads_it(tmp_path):
    masters = on(2, fsdp.saves, str(tmp_path), {"bf16": True, "use_mp_opt": True})[0]["saved"]
    in_fp32 = on(1, fsdp.loads, str(tmp_path), {})[0]["saved"]
    same({name: value.bfloat16().float() for name, value in in_fp32.items()}, masters, what="rounded", within=0.0)
    assert any(not torch.equal(in_fp32[name], masters[name]) for name in masters)


def _scale(folder, saving):
    ours = fsdp.strategy(fp16=True)
    model = workload.transformer()
    model, _ = ours.prepare((model, ours.create_optimizer(model, lr=1e-3)))
    scale = ours.prepared.of(model).backend["sharded"].loss_scale
    if saving:
        scale.scale, scale.good_steps = 256.0, 7
        ours.save_ckpt(model, folder)
    else:
        ours.load_ckpt(model, folder)
    return scale.scale, scale.good_steps


def test_the_loss_scale_goes_on_where_it_was(tmp_path):
    assert on(2, _scale, str(tmp_path), True) == on(1, _scale, str(tmp_path), False) * 2 == [(256.0, 7)] * 2


def _other(folder, strict):
    ours = fsdp.strategy()
    model = workload.transformer()
    model.more = nn.Linear(2, 2)
    model = ours.prepare(model)
    more = {name: value for name, value in workload.weights(ours, model).items() if "more" in name}
    try:
        ours.load_ckpt(model, folder, load_module_strict=strict, load_module_only=True)
    except CheckpointError as error:
        return str(error)
    after = workload.weights(ours, model)
    return all(torch.equal(after[name], value) for name, value in more.items()), after["embedding.weight"]


def test_what_a_checkpoint_lacks_is_named_or_left_alone(tmp_path):
    saved = on(2, fsdp.saves, str(tmp_path), {})[0]["saved"]
    message = on(2, _other, str(tmp_path), True)[0]
    assert "missing: head.weight; missing: more.weight; missing: more.bias" in message
    untouched, embedding = on(2, _other, str(tmp_path), False)[0]
    assert untouched
    assert torch.equal(embedding, saved["embedding.weight"])


def _without_optimizer(folder):
    ours = fsdp.strategy()
    model = ours.prepare(workload.transformer(tied=True))
    with pytest.raises(CheckpointError) as caught:
        ours.load_ckpt(model, folder)
    ours.load_ckpt(model, folder, load_optimizer_states=False)
    return str(caught.value)


def test_f18_states_are_not_left_out_unnoticed(tmp_path):
    on(2, fsdp.saves, str(tmp_path), {})
    assert "pass load_optimizer_states=False" in on(2, _without_optimizer, str(tmp_path))[0]


def _unreadable(folder, patch):
    ours = fsdp.strategy()
    model = ours.prepare(workload.transformer())
    ours.create_optimizer(model)
    ours.save_ckpt(model, folder)
    dist.barrier()
    patch()
    with pytest.raises(CheckpointError) as caught:
        ours.load_ckpt(model, folder)
    return str(caught.value)


def test_k10_files_that_one_rank_cannot_read_are_an_error_on_all(tmp_path, monkeypatch):
    works = fsdp_checkpoint.read_metadata

    def read(folder):
        if dist.get_rank() == 1:
            raise CheckpointError("damaged")
        return works(folder)

    for message in on(
        2, _unreadable, str(tmp_path), lambda: monkeypatch.setattr(fsdp_checkpoint, "read_metadata", read)
    ):
        assert message == "the checkpoint was not loaded: rank 1: damaged"


def _around_evaluations(folder):
    """After a forward pass without backward the root stays gathered."""
    ours = fsdp.strategy()
    model = workload.transformer()
    model, optimizer = ours.prepare((model, ours.create_optimizer(model, lr=1e-3)))
    fsdp.step(ours, model, optimizer, 0)
    before = _evaluated(ours, model)
    ours.save_ckpt(model, folder)
    fsdp.step(ours, model, optimizer, 1)
    changed = _evaluated(ours, model)
    ours.load_ckpt(model, folder)
    return torch.equal(_evaluated(ours, model), before), torch.equal(changed, before)


@torch.no_grad()
def _evaluated(ours, model):
    return model(fsdp.ids_of(ours, 0))


def test_evaluations_see_what_was_loaded_not_what_was_gathered_before(tmp_path):
    assert on(2, _around_evaluations, str(tmp_path)) == [(True, False)] * 2


# -- saved models -----------------------------------------------------------------------------------------------------


def _saves_model(kind, folder, settings):
    ours = fsdp.strategy(**settings)
    model = {"qwen2": fsdp.qwen2, "actor": lambda: fsdp.Actor(fsdp.qwen2()), "peft": _adapted}[kind]()
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    model, optimizer = ours.prepare((model, optimizer))
    fsdp.step(ours, model, optimizer, 0)
    ours.save_model(model, None, folder)
    return workload.weights(ours, model)


def _adapted():
    torch.manual_seed(0)
    settings = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    return peft.get_peft_model(fsdp.qwen2(), settings)


@pytest.mark.parametrize(("settings", "dtype"), [({}, "float32"), ({"bf16": True}, "bfloat16")])
def test_k18_a_saved_transformers_model_loads_with_from_pretrained(settings, dtype, tmp_path):
    expected = on(2, _saves_model, "qwen2", str(tmp_path), settings)[0]
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["architectures"] == ["Qwen2ForCausalLM"]
    assert said["dtype"] == dtype
    model = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert str(model.dtype) == f"torch.{dtype}"
    same({name: one.detach().float() for name, one in model.named_parameters()}, expected, what="saved", within=0.0)


def test_the_model_inside_is_saved_so_that_it_loads_and_the_rest_beside_it(tmp_path):
    expected = on(2, _saves_model, "actor", str(tmp_path), {})[0]
    inside = Qwen2ForCausalLM.from_pretrained(tmp_path)
    found = {f"model.{name}": one.detach() for name, one in inside.named_parameters()}
    found |= load_file(tmp_path / "outside.safetensors")
    same(found, expected, what="saved", within=0.0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_of_a_model_with_adapters_the_adapters_are_saved(tmp_path):
    expected = on(2, _saves_model, "peft", str(tmp_path), {})[0]
    assert not (tmp_path / "model.safetensors").exists()
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    model = peft.PeftModel.from_pretrained(fsdp.qwen2(), tmp_path)
    same({name: one.detach() for name, one in model.named_parameters()}, expected, what="saved", within=0.0)


def _cannot_write(folder):
    ours = fsdp.strategy()
    model = ours.prepare(workload.transformer())
    with pytest.raises(CheckpointError) as caught:
        ours.save_model(model, None, folder)
    return str(caught.value)


def test_k10_a_model_that_rank_0_cannot_write_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    for message in on(2, _cannot_write, str(tmp_path / "file")):
        assert "the model was not saved" in message


class Uncopyable(torch.Tensor):
    """As if there were no memory for a copy of it."""

    def to(self, *args, **kwargs):
        raise MemoryError("no memory for a copy")


def _cannot_copy(folder):
    model = nn.Linear(2, 2)
    gathered = []

    def parameters():
        for name, value in model.named_parameters():
            dist.barrier()  # as a gathering of the parameter
            gathered.append(name)
            yield name, value.detach().as_subclass(Uncopyable) if name == "weight" else value

    with pytest.raises(CheckpointError) as caught:
        saving.save_pretrained(model, parameters(), None, folder, Ranks())
    return gathered, str(caught.value)


def _with_group(program, *args):
    dist.init_process_group("gloo")
    return program(*args)


def test_k10_weights_that_rank_0_cannot_hold_are_an_error_on_all_after_the_last_was_gathered(tmp_path):
    for gathered, message in on(2, _with_group, _cannot_copy, str(tmp_path / "model")):
        assert gathered == ["weight", "bias"]
        assert "rank 0: MemoryError: no memory for a copy" in message
    assert not (tmp_path / "model").exists()


def test_the_dtype_of_a_model_that_cannot_be_saved_stays(tmp_path, monkeypatch):
    model = fsdp.qwen2()
    kept = model.config.dtype
    weights = [(name, value.bfloat16()) for name, value in model.named_parameters()]
    works, calls = Qwen2Config.save_pretrained, []

    def full(self, folder, *args, **kwargs):
        calls.append(folder)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return works(self, folder, *args, **kwargs)

    monkeypatch.setattr(Qwen2Config, "save_pretrained", full)
    with pytest.raises(CheckpointError, match="No space left"):
        saving.save_pretrained(model, weights, None, str(tmp_path), Ranks())
    assert len(calls) == 2
    assert model.config.dtype == kept


# -- models built without storage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "settings"), [("config", {}), ("pretrained", {"bf16": True, "use_mp_opt": True})])
def test_a_model_built_on_rank_0_alone_is_the_model_that_all_would_have_built(how, settings, tmp_path):
    fsdp.qwen2(seed=1).save_pretrained(tmp_path)
    expected = on(2, fsdp.built, False, how, str(tmp_path), settings)
    found = on(2, fsdp.built, True, how, str(tmp_path), settings)
    assert [one["bare"] > 0 for one in found] == [False, True]
    for ours, theirs in zip(found, expected, strict=True):
        same(ours["weights"], theirs["weights"], what="weights", within=0.0)
        same(ours["buffers"], theirs["buffers"], what="buffers", within=0.0)
        assert "model.rotary_emb.inv_freq" in ours["buffers"]
        assert ours["tied"]
        assert ours["step"] == theirs["step"]
        assert ours["drawn"] == theirs["drawn"], "the random state of ranks that built nothing"


def _different_models():
    ours = fsdp.strategy()
    with ours.init_model_context(meta_init=True):
        model = nn.Linear(2, 2 + ours.get_rank())
    with pytest.raises(ConfigError) as caught:
        ours.prepare(model)
    return str(caught.value)


def test_ranks_that_build_different_models_are_told():
    first, second = on(2, _different_models)
    assert "the ranks have built different models" in first
    assert "weight" in second


def _on_meta():
    ours = fsdp.strategy()
    with torch.device("meta"):
        model = workload.transformer()
    with pytest.raises(ConfigError) as caught:
        ours.prepare(model)
    return str(caught.value)


def test_a_model_without_storage_anywhere_is_refused():
    assert "init_model_context(meta_init=True)" in on(1, _on_meta)[0]
