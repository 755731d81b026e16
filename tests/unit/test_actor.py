"""The actor alone: its log-probs are those of each sample by itself, however a batch is laid out."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_batches import LENGTHS, Images, batch, one_by_one, seen_batch
from torch import nn

from lightrft.errors import ConfigError
from lightrft.models import Actor, tiny
from lightrft.models.forward_pass import ForwardPass
from lightrft.strategy import StrategyConfig

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries below

FUSED = StrategyConfig(fused_linear_logprob=True, chunk_size=50)
MODEL = tiny.text_model()


def gradients(model, scores):
    model.zero_grad()
    (scores[0].pow(2).sum() / 50 + scores[1].sum()).backward()
    return {name: one.grad.clone() for name, one in model.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_f15_k23_log_probs_entropy_and_gradients_are_those_of_each_sample_alone(attention, fused, packed, side):
    MODEL.set_attn_implementation(attention)
    ids, mask = batch(side=side)
    expected = one_by_one(MODEL, ids, mask, temperature=0.7)
    actor = Actor(MODEL, FUSED if fused else None)
    found = actor(ids, mask, temperature=0.7, entropy=True, packed=packed)
    assert found.log_probs.dtype == torch.float32
    torch.testing.assert_close(tuple(found), expected, atol=2e-5, rtol=1e-5)
    assert (found.log_probs[mask[:, 1:] * mask[:, :-1] == 0] == 0).all()
    wanted = gradients(MODEL, expected)
    for name, gradient in gradients(MODEL, found).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-4, msg=name)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 10), min_size=1, max_size=7),
    side=st.sampled_from(["right", "left", "both"]),
    seed=st.integers(0, 99),
)
def test_f15_packing_changes_nothing(lengths, side, seed):
    MODEL.set_attn_implementation("sdpa")
    ids, mask = batch(lengths, 10, side, seed)
    with torch.no_grad():
        found = Actor(MODEL)(ids, mask, packed=True).log_probs
        torch.testing.assert_close(found, one_by_one(MODEL, ids, mask)[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [StrategyConfig(), FUSED])
@pytest.mark.parametrize("packed", [False, True])
def test_k23_a_batch_of_padding_gives_zeros_and_no_gradient(settings, packed):
    ids, mask = batch((0, 0), 5)
    actor = Actor(MODEL, settings)
    found = actor(ids, mask, entropy=True, packed=packed)
    assert found.log_probs.tolist() == found.entropy.tolist() == [[0.0] * 4] * 2
    for gradient in gradients(MODEL, found).values():
        assert (gradient == 0).all()


def test_f16_temperature_divides_the_logits():
    ids, mask = batch()
    MODEL.set_attn_implementation("sdpa")
    hot, cold = (Actor(MODEL)(ids, mask, temperature=one).log_probs for one in (2.0, 0.5))
    assert hot[0, 0] != cold[0, 0]
    torch.testing.assert_close(cold, one_by_one(MODEL, ids, mask, 0.5)[0], atol=2e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="for tokens of greedy decoding pass 1.0"):
        Actor(MODEL)(ids, mask, temperature=0.0)


@pytest.mark.parametrize("settings", [StrategyConfig(), FUSED], ids=["plain", "fused"])
def test_f16_tokens_that_were_never_drawn_have_no_share_of_the_probability(settings):
    ids, mask = batch()
    never = [token for token in range(40, 60) if not (ids == token).any()]
    expected = one_by_one(MODEL, ids, mask, 0.7, never=never)
    actor = Actor(MODEL, settings)
    found = actor(ids, mask, temperature=0.7, entropy=True, logit_bias=dict.fromkeys(never, -100.0))
    torch.testing.assert_close(tuple(found), expected, atol=2e-5, rtol=1e-5)
    wanted = gradients(MODEL, expected)
    for name, gradient in gradients(MODEL, found).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-4, msg=name)
    assert (found.log_probs != actor(ids, mask, temperature=0.7).log_probs).any()
    with pytest.raises(ConfigError, match=r"logit_bias of the tokens \[128\]: expected token ids from 0 to 127"):
        actor(ids, mask, logit_bias={tiny.VOCABULARY: 1.0})


def test_a_bias_beside_that_of_the_output_layer_is_added_to_it():
    biased = copy.deepcopy(MODEL)
    biased.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, tiny.VOCABULARY))
    ids, mask = batch()
    plain, fused = (Actor(biased, one)(ids, mask, logit_bias={7: 2.0}).log_probs for one in (None, FUSED))
    torch.testing.assert_close(plain, fused, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        biased.lm_head.bias[7] += 2.0
    torch.testing.assert_close(plain, one_by_one(biased, ids, mask)[0], atol=2e-5, rtol=1e-5)


def test_without_entropy_there_is_none():
    assert Actor(MODEL)(*batch()).entropy is None


def test_only_logits_of_tokens_that_are_asked_for_are_computed():
    seen = []
    hook = MODEL.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape))
    Actor(MODEL)(*batch())
    hook.remove()
    assert seen == [(sum(max(0, length - 1) for length in LENGTHS), tiny.VOCABULARY)]
    assert MODEL(input_ids=torch.tensor([[7, 8]])).logits.shape == (1, 2, tiny.VOCABULARY), "it is as it was"


def test_the_output_layer_is_as_it_was_after_an_error():
    model = tiny.text_model()
    model.model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Actor(model)(*batch())
    assert "forward" not in vars(model.lm_head)


class Capped(transformers.Qwen2ForCausalLM):
    """Changes its logits, as some models do."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 3 * (found.logits / 3).tanh()
        return found


def test_a_model_that_changes_its_logits_is_computed_right_or_refused():
    capped = Capped(MODEL.config).eval()
    capped.load_state_dict(MODEL.state_dict())
    ids, mask = batch()
    torch.testing.assert_close(
        Actor(capped)(ids, mask).log_probs, one_by_one(capped, ids, mask)[0], atol=2e-5, rtol=1e-5
    )
    with pytest.raises(ConfigError, match="Capped changes what its output layer gives"):
        Actor(capped, FUSED)(ids, mask)


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ConfigError, match="Qwen2Model has no output layer"):
        Actor(MODEL.model)(*batch())


def test_flash_attention_gets_all_samples_in_one_row_and_others_rows_of_the_longest_sample():
    ids, mask = batch()
    shapes = {}
    for attention in ("sdpa", "flash_attention_2"):
        model = tiny.text_model()
        model.config._attn_implementation = attention
        run = ForwardPass.of(model, ids, mask, settings=StrategyConfig(), packed=True, images={})
        assert run.inputs["attention_mask"] is None
        shapes[attention] = tuple(run.inputs["input_ids"].shape)
    assert shapes == {"sdpa": (3, 12), "flash_attention_2": (1, sum(LENGTHS))}


def test_a_copy_is_an_actor_of_its_own():
    actor = Actor(tiny.text_model(), FUSED)
    other = copy.deepcopy(actor)
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    assert not torch.equal(other(*batch()).log_probs, actor(*batch()).log_probs)
    assert other._settings == FUSED


# -- Adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.tiny_text_model(path)
    return path


def test_adapters_change_nothing_at_first_and_alone_are_trained(folder):
    pytest.importorskip("peft")
    ids, mask = batch()
    actor = Actor.from_pretrained(folder, lora={"r": 2})
    torch.testing.assert_close(actor(ids, mask).log_probs, Actor.from_pretrained(folder)(ids, mask).log_probs)
    trained = [name for name, one in actor.named_parameters() if one.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    again = Actor.from_pretrained(folder, lora={"r": 2}).state_dict()
    assert all(torch.equal(again[name], one) for name, one in actor.state_dict().items()), "the seed alone decides"
    other = Actor.from_pretrained(folder, lora={"r": 2}, settings=StrategyConfig(seed=1)).state_dict()
    assert not all(torch.equal(other[name], one) for name, one in actor.state_dict().items())


def test_adapters_are_fused_beside_and_refused_in_the_output_layer(folder):
    pytest.importorskip("peft")
    ids, mask = batch()
    plain, fused = (
        Actor.from_pretrained(folder, lora={"init_lora_weights": False}, settings=one) for one in (None, FUSED)
    )
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(ids, mask).log_probs, plain(ids, mask).log_probs, atol=2e-5, rtol=1e-5)
    inside = Actor.from_pretrained(folder, lora={"target_modules": ["lm_head"]}, settings=FUSED)
    with pytest.raises(ConfigError, match="expected a linear layer without adapters"):
        inside(ids, mask)


def test_settings_of_adapters_that_are_none_are_named(folder):
    pytest.importorskip("peft")
    with pytest.raises(ConfigError, match="expected settings of peft.LoraConfig; .*'rank'"):
        Actor.from_pretrained(folder, lora={"rank": 2})


# -- Models that see --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packed", "side", "fused"),
    [(False, "right", True), (False, "left", False), (True, "right", False), (True, "left", True)],
)
def test_f15_samples_with_images_are_as_each_alone(packed, side, fused):
    model = tiny.vision_model()
    ids, mask, given, each = seen_batch(side=side)
    expected = one_by_one(model, ids, mask, 0.7, each)
    found = Actor(model, FUSED if fused else None)(ids, mask, temperature=0.7, entropy=True, packed=packed, **given)
    torch.testing.assert_close(tuple(found), expected, atol=5e-5, rtol=1e-5)
    wanted = gradients(model, expected)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, wanted[name], atol=5e-4, rtol=5e-4, msg=name)


@pytest.mark.parametrize("packed", [False, True])
def test_f15_samples_without_images_of_a_model_that_sees(packed):
    model = tiny.vision_model()
    ids, mask = batch()
    found = Actor(model)(ids, mask, packed=packed).log_probs
    torch.testing.assert_close(found, one_by_one(model, ids, mask)[0], atol=5e-5, rtol=1e-5)


def test_a_blank_image_stands_in_for_one_kind_and_not_for_two():
    model, settings = tiny.vision_model(), StrategyConfig(mixed_mm_data=True)
    ids, mask, given, _ = seen_batch()
    videos = {"pixel_values_videos": given["pixel_values"], "video_grid_thw": given["image_grid_thw"]}
    kinds = (ids == tiny.IMAGE).int()
    with pytest.raises(ConfigError, match="mixed_mm_data: got images and videos in one batch"):
        Actor(model, settings)(
            *map(torch.cat, ((ids, ids), (mask, mask))),
            **given,
            **videos,
            mm_token_type_ids=torch.cat((kinds, 2 * kinds)),
        )
    plain, ids, mask = Actor(model), *batch()
    torch.testing.assert_close(Actor(model, settings)(ids, mask).log_probs, plain(ids, mask).log_probs)
    assert not model.get_input_embeddings()._forward_hooks


def test_images_that_do_not_fit_are_refused():
    model = tiny.vision_model()
    ids, mask, given, _ = seen_batch()
    with pytest.raises(ConfigError, match="got one of pixel_values and image_grid_thw"):
        Actor(model)(ids, mask, pixel_values=given["pixel_values"])
    with pytest.raises(ConfigError, match="got pixels: expected some of image_grid_thw, mm_token_type_ids"):
        Actor(model)(ids, mask, pixels=given["pixel_values"])
    with pytest.raises(
        ConfigError, match="got pixel_values, image_grid_thw for Qwen2ForCausalLM, which sees no images"
    ):
        Actor(MODEL)(ids, mask, **given)
    for packed in (False, True):
        with pytest.raises(ConfigError, match="sample 2 has 6 tokens for pixel_values, which its 0 images do not fit"):
            Actor(model)(ids, mask, packed=packed, **Images().given(0, 1))
        with pytest.raises(ConfigError, match="got 4 images in pixel_values, and the samples have tokens for 3"):
            Actor(model)(ids, mask, packed=packed, **Images().given(0, 1, 2, 0))


def test_an_actor_is_no_transformers_model_and_holds_one():
    actor = Actor(MODEL)
    assert isinstance(actor, nn.Module)
    assert actor.config is MODEL.config
    assert {name.split(".")[0] for name, _ in actor.named_parameters()} == {"model"}
