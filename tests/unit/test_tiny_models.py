"""Tiny models on disk: what they are, and that everything loads them."""

import string

import pytest
import torch

from lightrft.models import tiny
from lightrft.strategy.model_files import ModelFiles

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers about what it uses itself


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind, written by the command line."""
    made = {kind: str(tmp_path_factory.mktemp(kind)) for kind in ("text", "vision")}
    tiny.main([made["text"]])
    tiny.main([made["vision"], "--vision"])
    return made


@pytest.mark.parametrize(
    ("kind", "auto", "build"),
    [
        ("text", "AutoModelForCausalLM", tiny.text_model),
        ("vision", "AutoModelForImageTextToText", tiny.vision_model),
    ],
)
def test_a_folder_holds_the_model_of_its_seed(folders, kind, auto, build):
    loaded = getattr(transformers, auto).from_pretrained(folders[kind])
    same, other = build(0).state_dict(), build(1).state_dict()
    assert loaded.state_dict().keys() == same.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, same[name])
        assert not torch.equal(tensor, other[name]), "another seed gives other weights, norms and biases included"
    assert ModelFiles.of(folders[kind]).sees is (kind == "vision")


def test_building_draws_nothing_from_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny.text_model(1)
    assert torch.equal(torch.rand(3), expected)


def test_the_likeliest_token_stands_out():
    ids = torch.randint(len(tiny.SPECIAL), tiny.VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(0))
    for model in (tiny.text_model(), tiny.vision_model()):
        first, second = model(input_ids=ids).logits[0].topk(2).values.unbind(-1)
        assert (first - second).median() > 0.1


@pytest.mark.parametrize("kind", ["text", "vision"])
def test_every_token_is_a_letter_or_special(folders, kind):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    text = string.printable[:95] + "\n"
    assert tokenizer.encode(text) == [len(tiny.SPECIAL) + tiny.LETTERS.index(letter) for letter in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(range(tiny.VOCABULARY)) == "".join([*tiny.SPECIAL, *tiny.LETTERS])
    assert tokenizer.encode("a<eos>") == [len(tiny.SPECIAL), tiny.EOS]
    assert tokenizer.decode(range(8), skip_special_tokens=True) == "ab"
    assert tokenizer.encode("☃") == []
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (tiny.PAD, tiny.EOS)


def test_messages_become_a_prompt(folders):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["vision"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "system: Be brief.<eos>user: <|vision_start|><|image_pad|><|vision_end|>What is it?<eos>assistant: "
    )


def test_images_are_seen(folders):
    from PIL import Image

    processor = transformers.AutoImageProcessor.from_pretrained(folders["vision"])
    model = tiny.vision_model()
    found = []
    for colour in ("red", "blue"):
        seen = processor([Image.new("RGB", (56, 56), colour)], return_tensors="pt")
        ids = torch.tensor([[20, tiny.VISION_START, *[tiny.IMAGE] * 4, tiny.VISION_END, 21]])
        found.append(model(input_ids=ids, mm_token_type_ids=(ids == tiny.IMAGE).int(), **seen).logits[0, -1])
    assert (found[0] - found[1]).abs().max() > 1e-3
