"""The adapter for SGLang, on the real one, with a model that sees. Run in a process of its own."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightrft.errors import ConfigError, EngineStateError
from lightrft.models import tiny
from lightrft.models.tiny import IMAGE, VIDEO, VISION_END, VISION_START
from lightrft.strategy.requests import Request
from lightrft.strategy.sglang_utils import start
from lightrft.strategy.weight_sync import send

sys.path.insert(0, str(Path(__file__).parent))  # for the processes of the engine too

import on_cpu

pytestmark = pytest.mark.filterwarnings("default")  # those of SGLang, and what its processes leave open

ONE_IMAGE = (VISION_START, IMAGE, VISION_END)
ONE_VIDEO = (VISION_START, VIDEO, VISION_END)
GREEDY = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}


def picture(width, height, seed):
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SMALL, WIDE = picture(56, 56, 0), picture(112, 56, 1)


@pytest.fixture(scope="module")
def models():
    return tiny.vision_model(seed=0), tiny.vision_model(seed=1)


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    folder = on_cpu.save(models[0], tmp_path_factory.mktemp("model"), tiny.vision_processor())
    engine = start(on_cpu.settings(folder, max_model_len=128))
    yield engine
    engine.shutdown()


@torch.no_grad()
def expected(model, prompt, images):
    """The prompt with its image tokens expanded, and what transformers generates after it."""
    text = tiny.tokenizer().decode(prompt)
    inputs = tiny.vision_processor()(text=[text], images=list(images) or None, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    length = inputs["input_ids"].shape[1]
    return found[:length].tolist(), found[length:].tolist()


REQUESTS = [
    ((10, *ONE_IMAGE, 11), (SMALL,)),
    ((10, 11, 12), ()),
    ((10, *ONE_IMAGE, *ONE_IMAGE, 12), (WIDE, SMALL)),
    ((13, *ONE_IMAGE), (WIDE,)),
]


def check_images(engine, model):
    requests = [Request(prompt_token_ids=prompt, images=images) for prompt, images in REQUESTS]
    found = engine.generate(requests, GREEDY)
    for one, (prompt, images) in zip(found, REQUESTS, strict=True):
        tokens, output = expected(model, prompt, images)
        assert list(one.prompt_token_ids) == tokens
        assert list(one.output_token_ids) == output


def test_k06_prompts_with_any_number_of_images(engine, models):
    check_images(engine, models[0])


def test_f05_no_cache_of_images_survives_an_update(engine, models):
    for model in (models[1], models[0]):
        weights = {name.replace("model.visual", "visual"): each for name, each in model.state_dict().items()}
        weights = {name.replace("model.language_model", "model"): each for name, each in weights.items()}
        send(engine, weights.items(), bucket_bytes=1 << 20)
        check_images(engine, model)
        check_images(engine, model)


def test_f06_a_name_that_would_end_the_engine_is_refused(engine, models):
    from lightrft.errors import WeightSyncError

    with pytest.raises(WeightSyncError, match="unexpected: .*model.visual"):
        send(engine, models[0].state_dict().items(), bucket_bytes=1 << 20)
    test_f05_no_cache_of_images_survives_an_update(engine, models)


def test_videos_and_text_with_an_image(engine, models):
    film = np.stack([np.array(picture(56, 56, seed)) for seed in range(4)])
    letters = "".join(tiny.LETTERS[token - len(tiny.SPECIAL)] for token in (10, 11))
    found = engine.generate(
        [
            Request(prompt_token_ids=(10, *ONE_VIDEO, 11), videos=(film,)),
            Request(prompt=f"{letters}<|vision_start|><|image_pad|><|vision_end|>", images=(SMALL,)),
        ],
        {**GREEDY, "n": 1},
    )
    assert found[0].prompt_token_ids == (10, VISION_START, *[VIDEO] * 8, VISION_END, 11)
    tokens, output = expected(models[0], (10, 11, *ONE_IMAGE), (SMALL,))
    assert (list(found[1].prompt_token_ids), list(found[1].output_token_ids)) == (tokens, output)


def test_an_image_that_is_not_there(engine, models):
    request = Request(prompt_token_ids=(10, *ONE_IMAGE), images=("/no/such/file.png",))
    with pytest.raises(EngineStateError, match="SGLang could not generate: .*No such file"):
        engine.generate([request], GREEDY)
    check_images(engine, models[0])


@pytest.mark.parametrize(
    ("prompt", "media", "said"),
    [
        ((10, VISION_START, *[IMAGE] * 4, VISION_END), {"images": (SMALL,)}, "4 image tokens .* for 1 images"),
        ((10, 11), {"images": (SMALL,)}, "0 image tokens .* for 1 images"),
        ((10, *ONE_IMAGE), {}, "1 image tokens .* for 0 images"),
        ((10, *ONE_IMAGE), {"images": (SMALL, WIDE)}, "1 image tokens .* for 2 images"),
        ((10, *ONE_VIDEO), {"images": (SMALL,)}, "0 image tokens .* for 1 images"),
    ],
)
def test_tokens_that_do_not_fit_what_is_seen(engine, models, prompt, media, said):
    with pytest.raises(ConfigError, match=f"request 1: {said}"):
        engine.generate([Request(prompt_token_ids=(10,)), Request(prompt_token_ids=prompt, **media)], GREEDY)
    check_images(engine, models[0])
