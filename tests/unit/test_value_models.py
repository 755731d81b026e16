"""Critic and reward model alone: values are those of each sample by itself; heads come from seed or checkpoint."""

import pytest
import torch
from model_batches import batch, seen_batch

from lightrft.errors import ConfigError
from lightrft.models import Critic, RewardModel, tiny
from lightrft.strategy import StrategyConfig

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries below

MODEL = tiny.text_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.tiny_text_model(path)
    return path


def one_by_one(body, head, ids, mask):
    """Values of each sample by itself."""
    found = torch.zeros(ids.shape)
    for row in range(len(ids)):
        places = mask[row].nonzero().flatten()
        if len(places):
            found[row, places] = head(body(input_ids=ids[row][places][None]).last_hidden_state)[0, :, 0]
    return found


def last(values, mask):
    return torch.stack(
        [row[own.nonzero()[-1, 0]] if own.any() else row[0] * 0 for row, own in zip(values, mask, strict=True)]
    )


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("packed", [False, True])
def test_f15_k23_values_and_gradients_are_those_of_each_sample_alone(packed, side):
    ids, mask = batch(side=side)
    critic, reward = Critic(MODEL), RewardModel(MODEL)
    expected = one_by_one(MODEL.model, critic.value_head, ids, mask)
    found = critic(ids, mask, packed=packed)
    assert (found.shape, found.dtype) == (ids.shape, torch.float32)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(reward(ids, mask, packed=packed), last(expected, mask), atol=2e-5, rtol=1e-5)
    (wanted,) = torch.autograd.grad(expected.sum(), critic.value_head.weight)
    (got,) = torch.autograd.grad(found.sum(), critic.value_head.weight)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_values_of_samples_with_images(packed):
    model = tiny.vision_model()
    ids, mask, given, each = seen_batch()
    critic = Critic(model)
    found = critic(ids, mask, packed=packed, **given)
    for row in range(len(ids)):
        own = ids[row][mask[row].bool()][None]
        hidden = model.model(input_ids=own, **each[row]).last_hidden_state
        torch.testing.assert_close(found[row, : own.shape[1]], critic.value_head(hidden)[0, :, 0], atol=5e-5, rtol=1e-5)


def test_the_last_real_token_counts_even_if_padding_has_the_id_of_the_end():
    ids = torch.tensor([[9, 10, tiny.EOS, tiny.EOS]])
    reward = RewardModel(MODEL)
    short, long = (reward(ids, torch.tensor([mask])) for mask in ([1, 1, 1, 0], [1, 1, 1, 1]))
    torch.testing.assert_close(short, reward(ids[:, :3], torch.ones(1, 3)))
    assert (short - long).abs() > 1e-3


def test_the_seed_alone_decides_on_a_head(folder):
    heads = []
    for seed in (1, 1, 2):
        torch.rand(1)
        heads.append(Critic.from_pretrained(folder, settings=StrategyConfig(seed=seed)).value_head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.5 < heads[0].norm() < 2, "values have a spread of about one"


def test_a_language_model_gives_its_body(folder):
    critic = Critic.from_pretrained(folder)
    assert type(critic.model).__name__ == "Qwen2Model"
    ids, mask = batch()
    expected = one_by_one(MODEL.model, critic.value_head, ids, mask)
    torch.testing.assert_close(critic(ids, mask), expected, atol=2e-5, rtol=1e-5)


def classifier(labels=1):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {**MODEL.config.to_dict(), "num_labels": labels}
        return transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(**settings)).eval()


@pytest.mark.parametrize("kind", [Critic, RewardModel])
def test_a_model_for_sequence_classification_has_its_own_head(tmp_path, kind):
    model = classifier()
    model.save_pretrained(tmp_path)
    found = kind.from_pretrained(tmp_path)
    ids, mask = batch((9, 4, 12))
    ids[mask == 0] = tiny.PAD  # which is how transformers finds the last token
    assert not hasattr(found, "value_head")
    for packed in (False, True):
        got = found(ids, mask, packed=packed)
        got = last(got, mask) if kind is Critic else got
        torch.testing.assert_close(got, model(input_ids=ids, attention_mask=mask).logits[:, 0], atol=2e-5, rtol=1e-5)


def test_a_model_of_several_scores_is_refused(tmp_path):
    classifier(labels=3).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="gives 3 scores a sequence: expected a reward model, which gives one"):
        RewardModel.from_pretrained(tmp_path)


def test_a_head_keeps_its_dtype_and_values_are_in_32_bits(folder):
    critic = Critic.from_pretrained(folder, dtype=torch.bfloat16)
    assert critic.value_head.weight.dtype == torch.bfloat16
    assert critic(*batch()).dtype == torch.float32


def test_adapters_are_trained_beside_the_head(folder):
    pytest.importorskip("peft")
    critic = Critic.from_pretrained(folder, lora={"r": 2})
    trained = {name for name, one in critic.named_parameters() if one.requires_grad}
    assert "value_head.weight" in trained
    assert all(".lora_" in name for name in trained - {"value_head.weight"})
    ids, mask = batch()
    torch.testing.assert_close(critic(ids, mask), Critic.from_pretrained(folder)(ids, mask), atol=1e-6, rtol=0)
