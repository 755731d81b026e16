"""What reads prompts for a model: with torchvision and without."""

import pytest

from lightrft.datasets import PromptDataset
from lightrft.models import readers, tiny

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers about what it uses itself

MESSAGES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("text", "vision")}
    for folder, model, *parts in (
        (made["text"], tiny.text_model(), tiny.tokenizer()),
        (made["vision"], tiny.vision_model(), tiny.tokenizer(), tiny.image_processor()),
    ):
        for each in (model.config, *parts):
            each.save_pretrained(folder)
    return made


@pytest.fixture
def without_torchvision(monkeypatch):
    """What transformers raises then."""

    def refuse(*_, **__):
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", refuse)


def test_a_model_that_sees_no_images_has_its_tokenizer(folders):
    found = readers.reader_of(str(folders["text"]))
    assert isinstance(found, transformers.PreTrainedTokenizerBase)
    assert found.encode("a") == tiny.tokenizer().encode("a")


def test_with_torchvision_one_that_sees_has_its_processor(folders, monkeypatch):
    asked = []
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda path: asked.append(path) or "processor")
    assert readers.reader_of(str(folders["vision"])) == "processor"
    assert asked == [str(folders["vision"])]


def test_without_torchvision_its_tokenizer_and_its_image_processor(folders, without_torchvision, tmp_path):
    found = readers.reader_of(str(folders["vision"]))
    assert found.tokenizer.encode("a") == tiny.tokenizer().encode("a")
    assert found.image_processor.size == tiny.image_processor().size
    found.save_pretrained(str(tmp_path / "again"))
    again = readers.reader_of(str(_with_config(folders["vision"], tmp_path / "again")))
    assert again.chat_template == found.chat_template
    assert again.image_processor.size == found.image_processor.size


def test_without_torchvision_it_writes_prompts_as_a_processor_does(folders, without_torchvision):
    found = readers.reader_of(str(folders["vision"]))
    dataset = PromptDataset([("here", {"prompt": MESSAGES})], found, apply_chat_template=True)
    assert dataset[0].prompt == "user: <|vision_start|><|image_pad|><|vision_end|>What is it?<eos>assistant: "
    assert dataset[0].token_ids.count(tiny.IMAGE) == 1


def _with_config(source, folder):
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder
