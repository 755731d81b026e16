"""Parameters on their way to an engine: merged, and named as in a checkpoint."""

import pytest
import torch
from torch import nn

from lightrft.errors import WeightSyncError
from lightrft.models.tiny import tiny_text_model
from lightrft.strategy.utils.checkpoint_form import in_checkpoint_form

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def saved(model, folder):
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def sent(model):
    found = list(in_checkpoint_form(model, model.named_parameters()))
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


def same(got, wanted, **tolerance):
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.detach(), wanted[name], **tolerance)


@pytest.mark.parametrize("tied", [False, True])
def test_f06_a_language_model_keeps_its_names(tmp_path, tied):
    model = tiny_text_model(tmp_path, tie_word_embeddings=tied)
    same(sent(model), saved(model, tmp_path))
    assert ("lm_head.weight" in sent(model)) is not tied


def test_f06_a_model_inside_of_another_one_is_found_and_what_is_beside_it_left_out(tmp_path):
    class Actor(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model
            self.value_head = nn.Linear(32, 1)

    model = tiny_text_model(tmp_path)
    same(sent(Actor(model)), saved(model, tmp_path))


def test_f06_names_that_transformers_changes_are_changed_back(tmp_path):
    config = transformers.Qwen2VLConfig(
        text_config={
            "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
    )  # fmt: skip
    model = transformers.Qwen2VLForConditionalGeneration(config)
    files = saved(model, tmp_path)
    same(sent(model), files)
    assert any(name.startswith("visual.") for name in files)
    assert not any(name.startswith("visual.") for name, _ in model.named_parameters())


def test_a_model_of_ones_own_keeps_its_parameters():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    same(sent(model), dict(model.named_parameters()))


@pytest.mark.parametrize("wraps", [lambda model: model, nn.Sequential, "peft"])
def test_f06_buffers_that_a_checkpoint_has_are_sent_and_no_others(tmp_path, wraps):
    model = tiny_text_model(tmp_path)
    for name in ("bias", "count"):
        model.model.layers[1].mlp.register_buffer(name, torch.ones(3))
    model.model.layers[1].mlp.register_buffer("cache", torch.ones(3), persistent=False)
    wrap = (
        wraps if wraps != "peft" else lambda one: peft.get_peft_model(one, peft.LoraConfig(target_modules=["q_proj"]))
    )
    plain = set(saved(model, tmp_path)) - {"model.layers.1.mlp.bias", "model.layers.1.mlp.count"}
    names = {"model.layers.1.mlp.bias", "model.layers.1.mlp.cache", "model.norm.weight"}
    wrapped = wrap(model)
    found = [name for name, _ in in_checkpoint_form(wrapped, wrapped.named_parameters(), buffers=names)]
    assert sorted(found) == sorted({*plain, "model.layers.1.mlp.bias"})
    assert set(sent(wrapped)) == plain


def adapted(folder, *, tied=False, second=False, **settings):
    """A model with adapters that change what it computes."""
    torch.manual_seed(0)
    model = tiny_text_model(folder, tie_word_embeddings=tied)
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **settings}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings))
    if second:
        wrapped.add_adapter("second", peft.LoraConfig(r=3, target_modules=["q_proj"]))
        wrapped.base_model.set_adapter(["default", "second"])
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.1)
    return wrapped


def computes_the_same_once_sent(folder, wrapped):
    """What is sent computes what the model does; names of the weights that are not those before the adapters."""
    ids = torch.randint(2, 64, (1, 7))
    found = {name: tensor.clone() for name, tensor in sent(wrapped).items()}
    logits = wrapped(ids).logits
    model = tiny_text_model(folder / "plain")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(found)
    torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=1e-5)
    return {name for name, tensor in found.items() if not torch.allclose(tensor, before[name], atol=1e-6)}


@pytest.mark.parametrize("second", [False, True])
def test_lora_adapters_are_merged(tmp_path, second):
    wrapped = adapted(tmp_path, second=second)
    base = {name: tensor.clone() for name, tensor in wrapped.named_parameters() if "base_layer" in name}
    changed = computes_the_same_once_sent(tmp_path, wrapped)
    assert {name.split(".", 3)[3] for name in changed} == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    assert all(torch.equal(tensor, base[name]) for name, tensor in wrapped.named_parameters() if name in base)


@pytest.mark.parametrize("second", [False, True])
def test_f06_adapters_that_are_merged_already_are_not_merged_again(tmp_path, second):
    wrapped = adapted(tmp_path, second=second)
    wrapped.merge_adapter()
    assert computes_the_same_once_sent(tmp_path, wrapped)


@pytest.mark.parametrize("merged", [False, True])
def test_f06_adapters_that_are_off_are_left_out(tmp_path, merged):
    wrapped = adapted(tmp_path, modules_to_save=["lm_head"])
    if merged:
        wrapped.merge_adapter()
    wrapped.base_model.disable_adapter_layers()
    assert computes_the_same_once_sent(tmp_path, wrapped) == set()


@pytest.mark.parametrize("module", ["lm_head", "norm"])
def test_f06_modules_that_are_trained_beside_the_adapters_are_sent(tmp_path, module):
    wrapped = adapted(tmp_path, modules_to_save=[module])
    assert any(name.endswith(f"{module}.weight") for name in computes_the_same_once_sent(tmp_path, wrapped))


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed")
def test_f06_biases_of_adapters_are_merged_or_have_no_place(tmp_path):
    wrapped = adapted(tmp_path, target_modules=["q_proj"], lora_bias=True)
    changed = computes_the_same_once_sent(tmp_path, wrapped)
    assert {name.split(".", 3)[3] for name in changed} == {"self_attn.q_proj.weight", "self_attn.q_proj.bias"}
    with pytest.raises(WeightSyncError, match=r"down_proj adds a bias \(lora_bias\), and the layer has none"):
        sent(adapted(tmp_path, lora_bias=True))


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
def test_f06_a_copy_of_one_of_two_tied_layers_is_refused(tmp_path):
    wrapped = adapted(tmp_path, tied=True, modules_to_save=["lm_head"])
    with pytest.raises(WeightSyncError, match="which the model ties to each other"):
        sent(wrapped)
    wrapped.base_model.disable_adapter_layers()
    assert "lm_head.weight" not in sent(wrapped)
    both = adapted(tmp_path, tied=True, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    assert torch.equal(sent(both)["model.embed_tokens.weight"], both.get_output_embeddings().weight)


def test_adapters_that_cannot_be_merged_are_refused(tmp_path):
    ia3 = peft.get_peft_model(
        tiny_text_model(tmp_path),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    )
    with pytest.raises(WeightSyncError, match=r"q_proj has an adapter of Linear: LoRA of linear layers can be merged"):
        sent(ia3)
    lora = peft.get_peft_model(tiny_text_model(tmp_path), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    dora = peft.get_peft_model(
        tiny_text_model(tmp_path), peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)
    )
    with pytest.raises(WeightSyncError, match="q_proj has an adapter of Linear"):
        sent(dora)
    few = [(name, tensor) for name, tensor in lora.named_parameters() if "layers.1.self_attn.q_proj.lora_B" not in name]
    with pytest.raises(WeightSyncError, match="adapters of .*layers.1.self_attn.q_proj were not sent whole"):
        list(in_checkpoint_form(lora, few))


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_f06_an_actor_has_the_names_of_the_checkpoint_that_it_was_read_from(tmp_path, kind):
    from safetensors.torch import load_file

    from lightrft.models import Actor, tiny_vision_model

    (tiny_text_model if kind == "text" else tiny_vision_model)(tmp_path)
    same(sent(Actor.from_pretrained(tmp_path)), load_file(tmp_path / "model.safetensors"))
