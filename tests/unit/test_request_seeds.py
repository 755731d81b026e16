"""Seeds of requests follow from the request, not from its place in a batch."""

import random

import numpy as np
import pytest
import torch

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


def test_text_and_tokens_differ():
    assert content_of(Request(prompt="")) != content_of(Request(prompt_token_ids=()))
