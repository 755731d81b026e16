"""Seeds of requests follow from the request, not from its place in a batch."""

import copy
import datetime as dt
import pickle
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightrft.errors import ConfigError
from lightrft.strategy.request_seeds import content_of, derived_seed, seeds_for
from lightrft.strategy.requests import Request


def contents(*prompts):
    return [content_of(Request(prompt_token_ids=tuple(prompt))) for prompt in prompts]


def test_a_request_has_its_seed_in_any_batch():
    batch = contents([1], [1, 2], [3], [4, 5])
    seeds = dict(zip(batch, seeds_for(batch, 7), strict=True))
    for count in range(1, 5):
        some = random.Random(count).sample(batch, count)
        assert seeds_for(some, 7) == [seeds[content] for content in some]
    assert len(set(seeds.values()) | set(seeds_for(batch, 8))) == 8


def test_the_same_request_again_has_a_seed_of_its_own():
    once, twice = contents([1], [2]), contents([1], [2], [1], [1])
    found = seeds_for(twice, 7)
    assert found[:2] == seeds_for(once, 7)
    assert len(set(found)) == 4


def test_seeds_are_the_same_in_every_process_and_leave_room_for_samples():
    assert seeds_for(contents([1, 2, 3]), 0) == [1423210556067592903]
    assert all(0 <= derived_seed(index, b"x") < 2**62 for index in range(100))


MEDIA = [
    torch.zeros(2, 3, dtype=torch.uint8),
    torch.zeros(3, 2, dtype=torch.uint8),
    torch.zeros(2, 3, dtype=torch.bfloat16),
    np.zeros((2, 3), dtype=np.uint8),
    np.ones((2, 3), dtype=np.uint8),
    "image.png",
    (torch.ones(2), {"fps": 2}),
]


@pytest.mark.parametrize("kind", ["images", "videos"])
def test_what_is_seen_is_part_of_a_request(kind):
    found = [content_of(Request(prompt="what is this", **{kind: (medium,)})) for medium in MEDIA]
    found.append(content_of(Request(prompt="what is this")))
    found.append(content_of(Request(prompt="what is this", images=(MEDIA[0],), videos=(MEDIA[0],))))
    assert len(set(found)) == len(found)
    assert found[0] == content_of(Request(prompt="what is this", **{kind: (MEDIA[0].clone(),)}))


class Film:
    """An object without a representation of its own."""

    def __init__(self, frames, **more):
        self.frames = frames
        self.__dict__.update(more)


def changed(array):
    other = array.copy()
    other[500, 500] = 1
    return other


LARGE = np.zeros((1000, 1000))
PALETTE = Image.new("P", (2, 2))
OTHER_PALETTE = PALETTE.copy()
OTHER_PALETTE.putpalette([9] * 768)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"x": LARGE}, {"x": changed(LARGE)}),
        ({"x": [LARGE, 1]}, {"x": [changed(LARGE), 1]}),
        ({"x": 1}, {"y": 1}),
        ({1: "x"}, {"1": "x"}),
        (Film(LARGE), Film(changed(LARGE))),
        (Film(torch.zeros(2)), Film(torch.ones(2))),
        (Film(1, fps=2), Film(1, fps=3)),
        (np.zeros(2, np.int32), np.zeros(2, np.float32)),
        (np.array(["a", None], object), np.array(["b", None], object)),
        (PALETTE, OTHER_PALETTE),
        (Image.new("RGB", (2, 3)), Image.new("RGB", (3, 2))),
        (Path("a"), Path("b")),
        ([["a"], ["b"]], [["a", "b"]]),
        ("1", 1),
        (b"1", "1"),
        (1, True),
        (dt.timedelta(1), dt.timedelta(2)),
    ],
)
def test_media_that_differ_in_something_have_other_digests_and_copies_the_same(one, other):
    def content(medium):
        return content_of(Request(prompt="a", videos=(medium,)))

    assert content(one) != content(other)
    for medium in (one, other):
        assert content(medium) == content(pickle.loads(pickle.dumps(medium))) == content(copy.deepcopy(medium))


def test_the_order_of_a_mapping_is_none_of_its_content():
    one, other = ({"x": 1, "y": {3, 4}}, {"y": {4, 3}, "x": 1})
    assert content_of(Request(prompt="a", images=(one,))) == content_of(Request(prompt="a", images=(other,)))


def test_the_digest_of_media_is_the_same_in_every_process():
    media = ({"frames": torch.zeros(2), "names": {"a", "b", "c"}, "fps": 2.0}, np.zeros(2), dt.timedelta(1))
    assert content_of(Request(prompt="a", videos=media)).hex() == "87230bc175666967ee8fc8b83a345de8"


def test_a_medium_that_nobody_can_read_is_refused():
    with pytest.raises(ConfigError, match="an image or a video is a lock, which cannot be pickled .*: give images"):
        content_of(Request(prompt="a", images=(threading.Lock(),)))


def test_text_and_tokens_differ():
    assert content_of(Request(prompt="")) != content_of(Request(prompt_token_ids=()))
