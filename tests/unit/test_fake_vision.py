"""Images and videos on the fake engine that runs the model: what it sees is what transformers sees."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from engines import on_cpu
from PIL import Image

from lightrft.errors import ConfigError
from lightrft.models import tiny
from lightrft.sim import SimWorld
from lightrft.sim.engine.transformer_model import TransformerModel, checkpoint_tensors
from lightrft.sim.engine.vision import Patches
from lightrft.strategy import get_strategy

pytest.importorskip("transformers")

ONE_IMAGE = (tiny.VISION_START, tiny.IMAGE, tiny.VISION_END)
ONE_VIDEO = (tiny.VISION_START, tiny.VIDEO, tiny.VISION_END)
GREEDY = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "logprobs": 0}


@pytest.fixture(scope="module")
def models():
    return [tiny.vision_model(seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    return [on_cpu.save(model, tmp_path_factory.mktemp("model"), tiny.image_processor()) for model in models]


def picture(width, height, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


SMALL, WIDE, ODD = picture(56, 56, 0), picture(112, 56, 1), picture(50, 70, 2)
FILM = np.stack([np.array(picture(56, 56, seed)) for seed in range(3)])  # the last frame is there twice


def cut(videos):
    """What transformers makes of the frames of videos: two of them together in each patch."""
    patches, grids = [], []
    for frames in videos:
        even = np.concatenate([frames, frames[-1:]]) if len(frames) % 2 else frames
        ready = tiny.image_processor()(images=list(even), return_tensors="np", patch_size=14, temporal_patch_size=1)
        _, height, width = ready["image_grid_thw"][0]
        pixels = ready["pixel_values"].reshape(len(even) // 2, 2, height * width, 3, 14, 14)
        patches.append(pixels.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 3 * 2 * 14 * 14))
        grids.append([len(even) // 2, height, width])
    return {"pixel_values_videos": torch.tensor(np.concatenate(patches)), "video_grid_thw": torch.tensor(grids)}


def expanded(prompt, inputs):
    """``prompt`` with as many tokens for each image and video as it has merged patches."""
    counts = {
        tiny.IMAGE: iter((inputs.get("image_grid_thw", torch.zeros(0, 3)).prod(-1) // 4).tolist()),
        tiny.VIDEO: iter((inputs.get("video_grid_thw", torch.zeros(0, 3)).prod(-1) // 4).tolist()),
    }
    return [each for token in prompt for each in [token] * (next(counts[token]) if token in counts else 1)]


@torch.no_grad()
def expected(model, prompt, images=(), videos=()):
    """The prompt expanded, the greedy tokens of transformers, and their log-probs."""
    inputs = dict(tiny.image_processor()(images=list(images), return_tensors="pt")) if images else {}
    inputs |= cut(videos) if videos else {}
    tokens = expanded(prompt, inputs)
    ids = torch.tensor([tokens])
    kinds = (ids == tiny.IMAGE).int() + 2 * (ids == tiny.VIDEO).int()
    found = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, max_new_tokens=8, do_sample=False,
        eos_token_id=None, pad_token_id=0, output_scores=True, return_dict_in_generate=True, **inputs,
    )  # fmt: skip
    drawn = found.sequences[0, len(tokens) :]
    log_probs = torch.stack([step[0].log_softmax(-1) for step in found.scores]).gather(1, drawn[:, None])[:, 0]
    return tuple(tokens), tuple(drawn.tolist()), log_probs


PROMPTS = [
    ((10, *ONE_IMAGE, 11), (SMALL,), ()),
    ((10, 11, 12), (), ()),
    ((10, *ONE_IMAGE, *ONE_IMAGE, 12), (WIDE, SMALL), ()),
    ((13, *ONE_VIDEO, 20, 21), (), (FILM,)),
    ((13, *ONE_VIDEO, 20, *ONE_IMAGE), (ODD,), (FILM[:2],)),
    ((13, *ONE_IMAGE), (WIDE,), ()),
]


def generate(folder, engine, tp, prompts=PROMPTS):
    """Of prompts that are shared out over the ranks, the first to the last rank."""

    def program():
        settings = {"pretrain": folder, "prompt_max_len": 64, "generate_max_len": 64, "engine_type": engine}
        strategy = get_strategy({"strategy": "fake", "train_batch_size": 2, "engine_tp_size": tp, **settings})
        strategy.setup_inference_engine()
        mine = prompts[strategy.get_rank() :: 2]
        found = strategy.gather_and_generate(
            GREEDY,
            all_prompt_token_ids=[prompt for prompt, *_ in mine],
            all_images=[image for _, images, _ in mine for image in images],
            images_num=[len(images) for _, images, _ in mine],
            all_videos=[video for *_, videos in mine for video in videos],
            videos_num=[len(videos) for *_, videos in mine],
        )
        strategy.inference_engine.shutdown()
        dist.destroy_process_group()
        return found

    ranks = SimWorld(2, stall_limit=60).run(program)
    return [ranks[place % 2][place // 2] for place in range(len(prompts))]


@pytest.mark.parametrize(("engine", "tp"), [("vllm", 1), ("vllm", 2), ("sglang", 2)])
def test_k06_prompts_with_images_videos_and_none_of_them_are_completed_as_by_transformers(engine, tp, models, folders):
    found = generate(folders[0], engine, tp)
    for one, (prompt, images, videos) in zip(found, PROMPTS, strict=True):
        tokens, drawn, log_probs = expected(models[0], prompt, images, videos)
        assert (one.prompt_token_ids, one.output_token_ids) == (tokens, drawn)
        torch.testing.assert_close(torch.tensor(one.log_probs), log_probs, atol=1e-5, rtol=0)


@pytest.fixture
def vllm():
    import importlib

    from lightrft.sim.engine.faces import faces

    with faces("model"):
        yield importlib.import_module("vllm")


def test_f05_each_cache_that_outlives_an_update_is_seen(vllm, models, folders):
    llm = vllm.LLM(folders[0])
    (prompt, images, _), params = PROMPTS[0], vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    other = dict(checkpoint_tensors(folders[1]))
    llm.generate([{"prompt_token_ids": list(prompt), "multi_modal_data": {"image": images}}], params)

    def log_probs(*caches):
        for forget in caches:
            forget()
        asked = [{"prompt_token_ids": list(prompt), "multi_modal_data": {"image": images}}]
        wanted = vllm.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0, flat_logprobs=True)
        found = llm.generate(asked, wanted)[0].outputs[0]
        return tuple(found.token_ids), tuple(round(each, 4) for each in found.logprobs.logprobs)

    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(other.items())})
    stale = [log_probs(), log_probs(llm.reset_prefix_cache)]
    fresh = log_probs(llm.reset_prefix_cache, llm.llm_engine.reset_encoder_cache)
    assert len({*stale, fresh}) == 3
    assert fresh[0] == expected(models[1], prompt, images)[1]


def test_a_prompt_that_is_seen_again_is_completed_the_same(folders):
    model = TransformerModel(folders[0], torch.float32)
    model.load(checkpoint_tensors(folders[0]))
    fresh = TransformerModel(folders[0], torch.float32, prefix_caching=False)
    fresh.load(checkpoint_tensors(folders[0]))
    from lightrft.sim.engine.media import expanded as with_places
    from lightrft.sim.engine.samples import Sample
    from lightrft.strategy.sampling import SamplingParams

    def sample(image, seed):
        medium = model.medium("image", image)
        tokens = with_places((10, *ONE_IMAGE, 20), tiny.IMAGE, [medium.tokens])
        params = SamplingParams(max_tokens=8, ignore_eos=True)
        return Sample(tokens=tokens, params=params, seed=seed, media=(medium,))

    asked = [sample(SMALL, 0), sample(SMALL, 1), sample(picture(56, 56, 9), 0)]
    found = [one.tokens for one in fresh.draw(asked)]
    assert len(set(found)) == 3
    for _ in range(2):
        assert [one.tokens for one in model.draw(asked)] == found
        assert [one.tokens for one in model.draw(asked[::-1])] == found[::-1]


def test_what_it_cannot_see_is_refused(vllm, tmp_path, models, folders):
    bare = vllm.LLM(on_cpu.save(models[0], tmp_path / "bare"))
    asked = {"prompt_token_ids": list(PROMPTS[0][0]), "multi_modal_data": {"image": SMALL}}
    with pytest.raises(ConfigError, match="no image processor for the images of a prompt: there is none in"):
        bare.generate([asked])
    config = json.loads((Path(folders[0]) / "config.json").read_text())
    later = type("Config", (), {**config, "model_type": "qwen3_vl"})
    with pytest.raises(ConfigError, match="takes no videos for qwen3_vl: use its hash mode"):
        Patches(folders[0], later).medium("video", FILM)
