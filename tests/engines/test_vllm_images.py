"""Images and videos in prompts, on real vLLM."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import on_cpu
from PIL import Image
from safetensors.torch import load_file

from lightrft.errors import ConfigError
from lightrft.models import tiny
from lightrft.sim import ProcessWorld
from lightrft.strategy import vllm_utils, weight_sync
from lightrft.strategy.requests import request_of
from lightrft.strategy.rollout import gather_and_generate

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.filterwarnings("error:::lightrft")]

IMAGE = [tiny.VISION_START, tiny.IMAGE, tiny.VISION_END]
VIDEO = [tiny.VISION_START, tiny.VIDEO, tiny.VISION_END]
TOKENS = 4
"""What an image of 56 x 56 pixels becomes: patches of 14 x 14, merged two by two."""
UNLIKELY = {tiny.IMAGE: -100.0, tiny.VIDEO: -100.0}
"""Tokens that stand for an image are none that a model should generate."""
GREEDY = {"temperature": 0, "max_tokens": 8, "logprobs": True, "ignore_eos": True, "logit_bias": UNLIKELY}
MODELS = [tiny.vision_model(seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [on_cpu.save(model, tmp_path_factory.mktemp("model"), tiny.vision_processor()) for model in MODELS]


def start(folder, **more):
    settings = on_cpu.settings(
        folder,
        max_model_len=128,
        max_tokens=7,
        seed=3,
        options={"kv_cache_memory_bytes": 32 << 20, "block_size": 32},
        **more,
    )
    return vllm_utils.start(settings)


@pytest.fixture(scope="module")
def engine(folders):
    engine = start(folders[0])
    yield engine
    engine.shutdown()


def image(seed):
    return Image.fromarray(np.random.RandomState(seed).randint(0, 255, (56, 56, 3), dtype=np.uint8))


def video(seed, frames=4):
    return np.random.RandomState(seed).randint(0, 255, (frames, 56, 56, 3), dtype=np.uint8)


def request(tokens, **media):
    return {"prompt_token_ids": tokens, "multi_modal_data": media}


MIXED = [
    request([10, *IMAGE, 20], image=image(0)),
    {"prompt_token_ids": [10, 20]},
    request([10, *IMAGE, 30, *IMAGE, 20], image=[image(0), image(1)]),
    request([10, *IMAGE, 20], image=[image(2)]),
    request([10, *VIDEO, 20], video=video(0)),
]


def assert_sees(completion, model, *images):
    """Log-probs are those of ``model`` for these images."""
    seen = tiny.vision_processor().image_processor(list(images), return_tensors="pt") if images else {}
    ids = torch.tensor([completion.prompt_token_ids + completion.output_token_ids])
    with torch.no_grad():
        logits = model(input_ids=ids, mm_token_type_ids=(ids == tiny.IMAGE).int(), **seen).logits[0]
    logits[:, list(UNLIKELY)] -= 100
    outputs = torch.tensor(completion.output_token_ids)[:, None]
    expected = logits[len(completion.prompt_token_ids) - 1 : -1].log_softmax(-1).gather(1, outputs)[:, 0]
    torch.testing.assert_close(torch.tensor(completion.log_probs), expected, atol=1e-4, rtol=0)


def update(engine, folder):
    """With the names of the checkpoint."""
    weights = load_file(f"{folder}/model.safetensors")
    weight_sync.send(engine, weights.items(), bucket_bytes=20_000, poison=True)


@pytest.mark.parametrize("turn", range(2))
@pytest.mark.parametrize("which", [1, 0])
def test_k06_f05_each_prompt_is_completed_for_its_own_images_with_the_present_weights(engine, folders, which, turn):
    update(engine, folders[which])
    one, none, two, other, film = engine.generate(MIXED, GREEDY)
    model = MODELS[which]
    assert_sees(one, model, image(0))
    assert_sees(none, model)
    assert_sees(two, model, image(0), image(1))
    assert_sees(other, model, image(2))
    assert one.prompt_token_ids.count(tiny.IMAGE) == TOKENS
    assert two.prompt_token_ids.count(tiny.IMAGE) == 2 * TOKENS
    assert film.prompt_token_ids.count(tiny.VIDEO) == 2 * TOKENS, "two frames become one"


@pytest.mark.processes
def test_k06_prompts_with_and_without_images_mix_across_ranks_that_share_an_engine(folders):
    def rollout():
        dist.init_process_group("gloo")
        engine = start(folders[0], tp_size=2, group=dist.group.WORLD)
        mine = MIXED[:1] if dist.get_rank() == 0 else MIXED[1:]
        found = gather_and_generate(
            engine,
            lambda: [request_of(one) for one in mine],
            GREEDY,
            group=dist.group.WORLD,
            device=torch.device("cpu"),
        )
        engine.shutdown()
        return found

    with ProcessWorld(2, backend="gloo", limit=180) as world:
        (one,), (none, two, other, film) = world.run(rollout)
    assert_sees(one, MODELS[0], image(0))
    assert_sees(none, MODELS[0])
    assert_sees(two, MODELS[0], image(0), image(1))
    assert_sees(other, MODELS[0], image(2))
    assert film.prompt_token_ids.count(tiny.VIDEO) == 2 * TOKENS


def test_a_video_is_seen(engine):
    first, again, second = engine.generate([request([10, *VIDEO, 20], video=video(seed)) for seed in (0, 0, 1)], GREEDY)
    assert first.log_probs == again.log_probs
    assert first.log_probs != second.log_probs


def test_the_same_question_about_two_images_has_two_seeds_in_any_order(engine):
    asked = [request([10, *IMAGE, 20], image=image(seed)) for seed in range(3)]
    sampled = {"max_tokens": 8, "seed": 4, "ignore_eos": True}
    forwards, backwards = engine.generate(asked, sampled), engine.generate(asked[::-1], sampled)
    assert [one.output_token_ids for one in forwards] == [one.output_token_ids for one in backwards[::-1]]


@pytest.mark.parametrize(
    ("tokens", "media", "message"),
    [
        ([10, *IMAGE, 20], {"image": [image(0), image(1)]}, r"prompt 5 has 1 image tokens \(id 4\) for 2 images"),
        ([10, *IMAGE, 20], {}, "prompt 5 has 1 image tokens .* for 0 images"),
        (
            [10, tiny.VISION_START, *[tiny.IMAGE] * 4, 20],
            {"image": image(0)},
            "prompt 5 has 4 image tokens .* for 1",
        ),
        ([10, *VIDEO, *VIDEO, 20], {"video": [video(0)]}, "prompt 5 has 2 video tokens .* for 1 videos"),
        ([10, *IMAGE, 20], {"image": "no image"}, "vLLM refuses the requests"),
    ],
)
def test_prompts_that_do_not_fit_their_images_are_refused(engine, tokens, media, message):
    with pytest.raises(ConfigError, match=message):
        engine.generate([*MIXED, request(tokens, **media)], GREEDY)
    assert len(engine.generate(MIXED, GREEDY)) == 5
